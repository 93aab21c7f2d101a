"""One job of caption scoring in Java (tokenize, METEOR, SPICE), which may hang or die alone.

    python evaluation/java.py JOB captions.json output.json

reads `[references, captions]`, both {image id: list of sentences}, and writes JOB's result.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

LAST = "lastsentence"  # one token


def tokenize(references: dict, captions: dict) -> list[dict]:
    """Tokenizes both with Stanford's tokenizer, a sentence a line.

    A known last line shows whether a line was added or lost, which would shift all later sentences.
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


def score(metric: str, references: dict, captions: dict) -> float:
    """METEOR 1.5 (Denkowski and Lavie, 2014) or SPICE (Anderson et al., 2016) of a split."""
    module = importlib.import_module("pycocoevalcap.{0}.{0}".format(metric.lower()))
    scorer = getattr(module, metric.capitalize())()
    return float(scorer.compute_score(references, captions)[0])


if __name__ == "__main__":
    _, job, source, target = sys.argv
    texts = json.loads(Path(source).read_text())
    try:
        output = tokenize(*texts) if job == "tokenize" else score(job, *texts)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # an orderly exit waits for the lock that a failed METEOR never releases
    Path(target).write_text(json.dumps(output))
