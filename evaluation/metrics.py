"""One job of caption scoring, in a process of its own so that it can hang or die alone.

    python evaluation/metrics.py METRIC captions.json scores.json

reads `[references, captions]`, both {image id: list of sentences}, and writes what METRIC's
function returns. The imports stand in the functions because a job needs only its own.
"""

import json
import os
import sys
import traceback

LAST = "lastsentence"  # one token


def tokenize(references: dict, captions: dict) -> list[dict]:
    """Tokenizes both with Stanford's tokenizer, which needs Java.

    Each sentence must be one line. A last one that is known shows whether as many lines came back:
    a line more or less would give every sentence after it to the one before or after.

    Raises:
        RuntimeError: Java gives back more or fewer lines than it got.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenized = []
    for sentences in (references, captions):
        coco = {image: [{"caption": line} for line in lines] for image, lines in sentences.items()}
        tokens = PTBTokenizer().tokenize(coco | {LAST: [{"caption": LAST}]})
        if tokens.pop(LAST, None) != [LAST]:
            raise RuntimeError("Java gave back more or fewer sentences than it got")
        tokenized.append(tokens)
    return tokenized


def bleu(references: dict, captions: dict) -> dict:
    """BLEU-1 to BLEU-4 (Papineni et al., 2002)."""
    from pycocoevalcap.bleu.bleu import Bleu

    scores, _ = Bleu(4).compute_score(references, captions, verbose=0)
    return {"scores": {f"Bleu_{n}": score for n, score in enumerate(scores, start=1)}}


def rouge_l(references: dict, captions: dict) -> dict:
    """ROUGE-L (Lin, 2004)."""
    from pycocoevalcap.rouge.rouge import Rouge

    return {"scores": {"ROUGE_L": float(Rouge().compute_score(references, captions)[0])}}


def cider(references: dict, captions: dict) -> dict:
    """CIDEr-D (Vedantam et al., 2015), of each image too."""
    from pycocoevalcap.cider.cider import Cider

    score, of_images = Cider().compute_score(references, captions)
    images = dict(zip(references, map(float, of_images), strict=True))
    return {"scores": {"CIDEr": float(score)}, "images": images}


def meteor(references: dict, captions: dict) -> dict:
    """METEOR 1.5 (Denkowski and Lavie, 2014); needs Java."""
    from pycocoevalcap.meteor.meteor import Meteor

    return {"scores": {"METEOR": Meteor().compute_score(references, captions)[0]}}


def spice(references: dict, captions: dict) -> dict:
    """SPICE (Anderson et al., 2016); needs Java, and downloads its models on first use."""
    from pycocoevalcap.spice.spice import Spice

    return {"scores": {"SPICE": float(Spice().compute_score(references, captions)[0])}}


JOBS = {
    "tokenize": tokenize,
    "BLEU": bleu,
    "ROUGE_L": rouge_l,
    "CIDEr": cider,
    "METEOR": meteor,
    "SPICE": spice,
}

if __name__ == "__main__":
    _, name, source, target = sys.argv
    with open(source) as file:
        references, captions = json.load(file)
    try:
        output = JOBS[name](references, captions)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # an orderly exit would wait for ever for the lock that a failed METEOR holds
    with open(target, "w") as file:
        json.dump(output, file)
