"""Penn Treebank tokens of captions, for machines without Java.

As Stanford's tokenizer, which published COCO scores use, except for smileys and hash tags.
"""

import re

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

ABBREVIATIONS = """
    adm apr assn aug ave bldg blvd bros calif capt cmdr co col conn corp ct dec dept dr est etc feb
    fla fri ft gen gov hon inc ind intl jan jr jul jun lt ltd maj mar md messrs mfg minn mme mlle
    mon mr mrs ms mt nov oct penn pres prof rd rep rev sen sep sept sgt sq sr st sts supt thu thurs
    tue tues univ va vs wed
""".split()

TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+   # addresses
    | (?:[a-z]\.)+(?:[a-z]\b|(?!\w))                           # u.s. a.m
    | (?:{"|".join(ABBREVIATIONS)})\.(?!\w) | no\.(?=\s*\d)    # mr. no. 5
    | \d+(?:[,.:/]\d+)+(?:-\w+)*                              # 1,000 10:30 1/2 3.5-inch
    | \w+?(?=n't\b) | n't\b                                   # is n't
    | '(?:s|m|d|ll|re|ve)\b | '(?:em|til|cause|n')(?!\w)       # it 's 'em rock 'n' roll
    | '(?<!\d')\d\ds?\b | 't(?=is\b|was\b)                   # '90s 't is
    | \w+(?:(?:[-/.]|'(?!(?:s|m|d|ll|re|ve)\b|\d))\w+?(?=n't\b|\b))*  # w/o o'clock
    | [?!]+ | \.{{3}} | -+ | [^\w\s]                           # the rest stands alone
    """,
    re.VERBOSE,
)
SPLIT = "can not, gim me, gon na, got ta, lem me, wan na, y' all".split(", ")
SPLIT = {parts.replace(" ", ""): parts for parts in SPLIT}
RESPELLED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
RESPELLED |= {"£": "#", "€": "$", "¢": "cents"}
ONE_SPELLING = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": " - ", "—": " - ", "…": "...", "½": "1/2"}
)
REMOVED = {*PUNCTUATIONS, '"'}


def ptb_tokenize(caption: str) -> str:
    """Lower-case tokens of a caption, separated by spaces, without punctuation."""
    tokens = TOKEN.findall(caption.translate(ONE_SPELLING).lower())
    tokens = [SPLIT.get(token, RESPELLED.get(token, token)) for token in tokens]
    return " ".join(token for token in tokens if token not in REMOVED and token.strip("-"))
