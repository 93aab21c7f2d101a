"""One job of caption scoring in Java, in a process of its own so that it can hang or die alone.

    python evaluation/metrics.py JOB captions.json output.json

reads `[references, captions]`, both {image id: list of sentences}, and writes what JOB's function
returns. The imports stand in the functions because a job needs only its own.
"""

import json
import os
import sys
import traceback

LAST = "lastsentence"  # one token


def tokenize(references: dict, captions: dict) -> list[dict]:
    """Tokenizes both, a sentence a line, with Stanford's tokenizer.

    A known last line shows whether as many came back: a line more or less would give every sentence
    after it to another one. `RuntimeError` if not.
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


def meteor(references: dict, captions: dict) -> float:
    """METEOR 1.5 (Denkowski and Lavie, 2014)."""
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(references, captions)[0])


def spice(references: dict, captions: dict) -> float:
    """SPICE (Anderson et al., 2016); downloads its models on first use."""
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(references, captions)[0])


JOBS = {"tokenize": tokenize, "METEOR": meteor, "SPICE": spice}

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
