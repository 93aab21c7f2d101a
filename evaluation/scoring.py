"""Scores of captions: BLEU, ROUGE-L, CIDEr, METEOR and, on request, SPICE.

The metrics are pycocoevalcap's. Each runs in its own process with a time limit; one that cannot
run or fails is reported beside the scores of the others.
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

from data.records import RESULTS, listed, read_records, read_references
from evaluation import metrics
from evaluation.ptb import ptb_tokenize
from utils import UserError, write_json

IN_PYTHON = ["BLEU", "ROUGE_L", "CIDEr"]
# What Stanford's tokenizer, METEOR or Python takes for the end of a line.
LINE_ENDS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))
NO_JAVA = "needs Java, which is not on PATH"
ENGLISH = "-Duser.language=en -Duser.country=US"  # METEOR reads decimals as Java's locale says


def score_results(
    results_path: str | Path,
    gt_path: str | Path,
    spice: bool = False,
    meteor: bool = True,
    timeout_s: float = 900.0,
) -> dict:
    """Scores a results file and writes what it finds beside it. For the main process only.

    `NAME.json` gives `NAME_scores.json` (`scores`, `left_out`, `tokenizer`, `remarks`) and
    `NAME_images.json` (caption, CIDEr and references of each image, for reading).

    Args:
        results_path: file that `caption_split` wrote.
        gt_path: see `score_captions`.
        spice: see `score_captions`.
        meteor: see `score_captions`.
        timeout_s: see `score_captions`.

    Returns:
        `scores`, `left_out`, `tokenizer` and `remarks` of `score_captions`.

    Raises:
        UserError: a file is missing or unreadable, or the two are not of the same images.
    """
    results_path = Path(results_path)
    results = read_records(results_path, RESULTS)
    report = score_captions(results, gt_path, spice, meteor, timeout_s)
    write_json(results_path.with_name(f"{results_path.stem}_images.json"), report.pop("images"))
    write_json(results_path.with_name(f"{results_path.stem}_scores.json"), report)
    return report


def score_captions(
    results: list[dict],
    gt_path: str | Path,
    spice: bool = False,
    meteor: bool = True,
    timeout_s: float = 900.0,
) -> dict:
    """Scores captions against COCO references.

    Args:
        results: `{"image_id": int, "caption": str}` an image, of exactly the images of `gt_path`.
        gt_path: references in COCO's annotation format.
        spice: also compute SPICE, whose first use downloads CoreNLP's models (about 0.4 GB).
        meteor: also compute METEOR, which takes some ten seconds whatever the number of images;
            a validation during training may go without.
        timeout_s: time limit in seconds, of the tokenizer and then of all metrics, which run
            side by side.

    Returns:
        `scores` {metric: float}, `left_out` {metric: why}, `tokenizer` (a sentence), `remarks` (a
        list of sentences on what the scores do not tell) and `images`, a list of
        `{"image_id", "caption", "CIDEr", "references"}`.

    Raises:
        UserError: the references cannot be read or are not of the same images.
    """
    references = read_references(gt_path)
    captions = {result["image_id"]: [result["caption"]] for result in results}
    if captions.keys() != references.keys() or len(captions) < len(results):
        raise UserError(
            f"{len(results)} captions of {len(captions)} images do not fit the {len(references)} "
            f"images of {gt_path}; were they made for another split? Caption the split again"
        )

    java = shutil.which("java") is not None
    *tokenized, tokenizer = _tokenize(references, captions, java, timeout_s)
    in_java = ["METEOR"] * meteor + ["SPICE"] * spice
    outputs, left_out = _run(IN_PYTHON + in_java * java, *tokenized, timeout_s)
    if not java:
        left_out |= dict.fromkeys(in_java, NO_JAVA)
    cider = outputs.get("CIDEr", {}).get("images", {})
    return {
        "scores": {k: v for output in outputs.values() for k, v in output["scores"].items()},
        "left_out": left_out,
        "tokenizer": tokenizer,
        "remarks": _remarks(*tokenized),
        "images": [
            {
                "image_id": image,
                "caption": caption,
                "CIDEr": cider.get(str(image)),
                "references": references[image],
            }
            for image, (caption,) in captions.items()
        ],
    }


def _remarks(references: dict[str, list[str]], captions: dict[str, list[str]]) -> list[str]:
    """What a reader of the scores must know of these tokenized sentences."""
    remarks = []
    if len(captions) == 1:
        remarks.append(
            "CIDEr is 0 for a single image: it weighs words by how few images' references have them"
        )
    empty = [image for image, (caption,) in captions.items() if not caption]
    if empty:
        remarks.append(
            f"{len(empty)} of {len(captions)} captions have no word (images: {listed(empty)})"
        )
    silent = [image for image, sentences in references.items() if not any(sentences)]
    if silent:
        remarks.append(
            f"the references of {len(silent)} of {len(references)} images have no word, so that no "
            f"caption is right (images: {listed(silent)})"
        )
    return remarks


def _tokenize(
    references: dict, captions: dict, java: bool, timeout_s: float
) -> tuple[dict, dict, str]:
    """References and captions in tokens, and a sentence that says by which tokenizer.

    Every sentence is first made one line, for tokens come back by line: one line end inside a
    sentence would give all tokens after it to other images.
    """
    references, captions = (
        {image: [sentence.translate(LINE_ENDS) for sentence in of_image] for image, of_image in g}
        for g in (references.items(), captions.items())
    )
    why = NO_JAVA
    if java:
        outputs, failures = _run(["tokenize"], references, captions, timeout_s)
        if outputs:
            return *outputs["tokenize"], "Stanford's PTB tokenizer (Java)"
        why = failures["tokenize"]
    tokenized = (
        {
            image: [ptb_tokenize(sentence) for sentence in sentences]
            for image, sentences in g.items()
        }
        for g in (references, captions)
    )
    return *tokenized, f"PTB rules in Python; Stanford's tokenizer {why}"


def _run(
    names: list[str], references: dict, captions: dict, timeout_s: float
) -> tuple[dict[str, dict], dict[str, str]]:
    """Runs jobs of `metrics.py` side by side, each in a process group of its own.

    Returns:
        Outputs by name, and for the jobs without one a sentence.
    """
    outputs, failures = {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        source = Path(folder, "captions.json")
        source.write_text(json.dumps([references, captions]))
        options = f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} {ENGLISH}"
        environment = os.environ | {"JAVA_TOOL_OPTIONS": options}
        processes = {}
        for name in names:
            log = stack.enter_context(open(Path(folder, f"{name}.log"), "w"))
            command = [sys.executable, metrics.__file__, name, source, Path(folder, f"{name}.json")]
            processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
            stack.callback(_kill_group, processes[name])
        deadline = time.monotonic() + timeout_s
        for name, process in processes.items():
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                failures[name] = f"did not finish within {timeout_s:g} s"
                continue
            if status == 0:
                outputs[name] = json.loads(Path(folder, f"{name}.json").read_text())
            else:
                log = Path(folder, f"{name}.log").read_text().strip()
                failures[name] = f"failed: {log.splitlines()[-1] if log else f'status {status}'}"
    return outputs, failures


def _kill_group(process: subprocess.Popen) -> None:
    """Ends a job with its children, such as a Java that hangs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
