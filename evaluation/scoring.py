"""Scores of captions by pycocoevalcap: BLEU, ROUGE-L, CIDEr, METEOR and, on request, SPICE.

Each metric in Java runs in a process of its own; one that fails is reported beside the scores.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from data.records import RESULTS, listed, read_records, read_references
from evaluation import java
from evaluation.ptb import ptb_tokenize
from reports.runs import write_scores
from utils import UserError, write_json

# what Stanford's tokenizer, METEOR or Python takes for the end of a line
LINE_ENDS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))
NO_JAVA = "needs Java, which is not on PATH"
ENGLISH = " -Duser.language=en -Duser.country=US"  # METEOR reads decimals as Java's locale says
REFERENCES = "coco_karpathy_{}_gt.json"
TIMEOUT = 900.0  # seconds for the tokenizer, and then for all metrics in Java


def score_again(path: Path, config: dict, spice: bool) -> None:
    """Scores a file of captions that an evaluation wrote, and prints and writes the scores."""
    split = path.stem
    if split not in ("val", "test"):
        raise UserError("--score_only takes the val.json or test.json of an evaluation")
    file = Path(config["coco_gt_root"], REFERENCES.format(split))
    report = score_captions(read_records(path, RESULTS), read_references(file), file, spice)
    notes = write_captions(path, report)
    write_scores(path.parent, split, report["scores"])
    print(f"{split}: {json.dumps(report['scores'])}", *notes, sep="\n")


def write_captions(path: Path | None, report: dict) -> list[str]:
    """Writes a report of `score_captions` as `NAME_images.json` and `NAME_scores.json`.

    Returns what is printed beside the scores.
    """
    rest = {key: value for key, value in report.items() if key != "images"}
    if path is not None:
        write_json(path.with_name(f"{path.stem}_images.json"), report["images"])
        write_json(path.with_name(f"{path.stem}_scores.json"), rest)
    left_out = [f"{metric} is left out: {why}" for metric, why in report["left_out"].items()]
    remarks = [f"note: {remark}" for remark in report["remarks"]]
    return [f"tokens: {report['tokenizer']}", *left_out, *remarks]


def score_captions(
    results: list[dict],
    references: dict[int, list[str]],
    source: Path,
    spice: bool = False,
    meteor: bool = True,
) -> dict:
    """Scores `{"image_id": int, "caption": str}` of each image against references by image id.

    Returns:
        `scores` {metric: float}, `left_out` {metric: why}, `tokenizer` (a sentence), `remarks`
        (sentences) and `images` [{"image_id", "caption", "CIDEr", "references"}, ...].

    Raises:
        UserError: captions and references belong to different images; names `source`.
    """
    captions = {result["image_id"]: [result["caption"]] for result in results}
    if captions.keys() != references.keys() or len(captions) < len(results):
        raise UserError(
            f"{len(results)} captions of {len(captions)} images do not fit the {len(references)} "
            f"images of {source}; were they made for another split? Caption the split again"
        )
    *tokenized, tokenizer = _tokenize(references, captions)
    bleu, _ = Bleu(4).compute_score(*tokenized, verbose=0)
    rouge, _ = Rouge().compute_score(*tokenized)
    cider, ciders = Cider().compute_score(*tokenized)
    ciders = dict(zip(tokenized[0], map(float, ciders), strict=True))
    scores = {f"Bleu_{n}": score for n, score in enumerate(bleu, start=1)}
    scores |= {"ROUGE_L": float(rouge), "CIDEr": float(cider)}
    more, left_out = _run_java(["METEOR"] * meteor + ["SPICE"] * spice, *tokenized)
    return {
        "scores": scores | more,
        "left_out": left_out,
        "tokenizer": tokenizer,
        "remarks": _remarks(*tokenized),
        "images": [
            result | {"CIDEr": ciders[str(image)], "references": references[image]}
            for image, result in zip(captions, results, strict=True)
        ],
    }


def _remarks(references: dict[str, list[str]], captions: dict[str, list[str]]) -> list[str]:
    """What a reader of the scores must know about these tokenized sentences."""
    remarks, count = [], len(captions)
    if count == 1:
        remarks.append("CIDEr is 0 for a single image: it weighs words by how few images have them")
    if empty := [image for image, (caption,) in captions.items() if not caption]:
        remarks.append(f"{len(empty)} of {count} captions have no word (images: {listed(empty)})")
    if silent := [image for image, sentences in references.items() if not any(sentences)]:
        why = f"no word, so that no caption is right (images: {listed(silent)})"
        remarks.append(f"the references of {len(silent)} of {count} images have {why}")
    return remarks


def _tokenize(references: dict, captions: dict) -> tuple[dict, dict, str]:
    """References and captions in tokens, by image id as text, and a sentence on the tokenizer."""
    lines = [
        {str(image): [text.translate(LINE_ENDS) for text in texts] for image, texts in of.items()}
        for of in (references, captions)
    ]
    outputs, failures = _run_java(["tokenize"], *lines)
    if outputs:
        return *outputs["tokenize"], "Stanford's PTB tokenizer (Java)"
    tokenized = [{image: list(map(ptb_tokenize, of[image])) for image in of} for of in lines]
    return *tokenized, f"PTB rules in Python; Stanford's tokenizer {failures['tokenize']}"


def _run_java(names: list[str], references: dict, captions: dict) -> tuple[dict, dict[str, str]]:
    """Runs jobs of `java.py` side by side; returns outputs and reasons of failure, by name."""
    if shutil.which("java") is None:
        return {}, dict.fromkeys(names, NO_JAVA)
    outputs, failures, processes = {}, {}, {}
    options = {"JAVA_TOOL_OPTIONS": os.environ.get("JAVA_TOOL_OPTIONS", "") + ENGLISH}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        source = Path(folder, "captions.json")
        source.write_text(json.dumps([references, captions]))
        for name in names:
            log = stack.enter_context(open(Path(folder, f"{name}.log"), "w"))
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            command = [sys.executable, java.__file__, name, source, Path(folder, f"{name}.json")]
            processes[name] = subprocess.Popen(
                command, **streams, start_new_session=True, env=os.environ | options
            )
            stack.callback(_kill_group, processes[name])  # with a Java that hangs
        deadline = time.monotonic() + TIMEOUT
        for name, process in processes.items():
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                failures[name] = f"did not finish within {TIMEOUT:g} s"
                continue
            if status == 0:
                outputs[name] = json.loads(Path(folder, f"{name}.json").read_text())
            else:
                lines = Path(folder, f"{name}.log").read_text().strip().splitlines()
                failures[name] = f"failed: {(lines or [f'status {status}'])[-1]}"
    return outputs, failures


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
