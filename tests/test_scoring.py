"""Scores against pycocoevalcap called directly, and what happens when Java is absent or hangs."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import psutil
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from data.records import read_references
from evaluation import java, scoring
from evaluation.ptb import ptb_tokenize
from evaluation.scoring import score_again
from utils import UserError, write_json

JAVA = shutil.which("java")
needs_java = pytest.mark.skipif(JAVA is None, reason="there is no Java on PATH")

REFERENCES = {
    7: ["A man's dog isn't on the bed.", "the dog (brown) sits, alone, on a bed"],
    3: ["Two half-eaten pizzas at 10:30 a.m.", "a table with two pizzas & a glass of beer!"],
    12: ['a sign that says "don\'t walk"', "St. John's street sign", "the sign is red and white"],
    40: ["a cat", "the cat's toy"],
}
CAPTIONS = {
    3: "two pizzas on a table with a glass of beer",
    7: "a man's dog on the bed",
    12: "a red and white street sign that says don't walk",
    40: "",
}
# What Stanford's tokenizer makes of them, without punctuation.
TOKENS = {
    "A man's dog isn't on the dogs' bed.": "a man 's dog is n't on the dogs bed",
    "It's 5 o'clock and I can't see John's U.S. flag, can you?": (
        "it 's 5 o'clock and i ca n't see john 's u.s. flag can you"
    ),
    "we cannot say; they're gonna (maybe) go -- or not...": (
        "we can not say they 're gon na -lrb- maybe -rrb- go or not"
    ),
    "a black-and-white sign: \"STOP\" & 'go' 50% off $5.00": (
        "a black-and-white sign stop & go 50 % off $ 5.00"
    ),
    "Mr. Smith at St. John's St. vs. Dr. Who etc.": "mr. smith at st. john 's st. vs. dr. who etc.",
    "half/half and/or 1/2 at 10:30am or 6 p.m.": "half/half and/or 1/2 at 10:30 am or 6 p.m.",
    "1,000 fries,and 3.5-inch 2x4's; the '90s rock 'n' roll": (
        "1,000 fries and 3.5-inch 2x4 's the '90s rock 'n' roll"
    ),
    "a dog—running – fast… “quoted” it’s": "a dog running fast quoted it 's",
    "what?! wow!!! is this no. 5? no.": "what ?! wow !!! is this no. 5 no",
    "the cat 's  tail\tdo n't [move] w/ w/o": "the cat 's tail do n't -lsb- move -rsb- w / w/o",
    " . ": "",
    "": "",
}


@pytest.fixture
def gt_path(tmp_path) -> Path:
    rows = [{"image_id": i, "caption": x} for i, texts in REFERENCES.items() for x in texts]
    write_json(tmp_path / "coco_karpathy_val_gt.json", {"annotations": rows})
    return tmp_path / "coco_karpathy_val_gt.json"


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Writes a script that takes Java's place."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "java").touch(0o755)
    return lambda script: (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")


def score_captions(results: list[dict], path: Path, **options) -> dict:
    """The scores by references in a file."""
    return scoring.score_captions(results, read_references(path), path, **options)


def results() -> list[dict]:
    return [{"image_id": image, "caption": caption} for image, caption in CAPTIONS.items()]


def expected_scores(references: dict, captions: dict) -> tuple[dict, dict]:
    """Scores of tokenized sentences, and CIDEr by image, by pycocoevalcap in this process."""
    bleu = Bleu(4).compute_score(references, captions, verbose=0)[0]
    cider, of_images = Cider().compute_score(references, captions)
    scores = {f"Bleu_{n}": score for n, score in enumerate(bleu, start=1)}
    scores |= {"ROUGE_L": Rouge().compute_score(references, captions)[0], "CIDEr": cider}
    return scores, dict(zip(references, of_images, strict=True))


def python_tokens() -> tuple[dict, dict]:
    references = {str(i): list(map(ptb_tokenize, REFERENCES[i])) for i in REFERENCES}
    return references, {str(i): [ptb_tokenize(caption)] for i, caption in CAPTIONS.items()}


def test_python_tokenizer():
    assert {caption: ptb_tokenize(caption) for caption in TOKENS} == TOKENS


def test_without_java_all_but_meteor_is_scored(gt_path, without_java):
    report = score_captions(results(), gt_path, spice=True)
    scores, of_images = expected_scores(*python_tokens())
    assert report["scores"] == pytest.approx(scores, rel=1e-9)
    assert 0 < scores["Bleu_4"] < scores["Bleu_1"] < 1 < scores["CIDEr"]
    assert report["left_out"] == dict.fromkeys(["METEOR", "SPICE"], scoring.NO_JAVA)
    assert report["tokenizer"] == f"PTB rules in Python; Stanford's tokenizer {scoring.NO_JAVA}"
    assert report["images"] == [
        row | {"references": REFERENCES[i], "CIDEr": pytest.approx(of_images[str(i)], rel=1e-9)}
        for i, row in zip(CAPTIONS, results(), strict=True)
    ]


@needs_java
@pytest.mark.parametrize("meteor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_with_java_scores_are_those_of_pycocoevalcap(gt_path, meteor):
    def tokens(texts):
        return PTBTokenizer().tokenize({i: [{"caption": x} for x in of] for i, of in texts.items()})

    report = score_captions(results(), gt_path, meteor=meteor)
    captions = tokens({i: [caption] for i, caption in CAPTIONS.items()})
    references = tokens({i: REFERENCES[i] for i in CAPTIONS})
    scores, _ = expected_scores(references, captions)
    if meteor:
        scores["METEOR"] = Meteor().compute_score(references, captions)[0]
    assert report["scores"] == pytest.approx(scores, rel=1e-9)
    assert report["left_out"] == {}
    assert report["tokenizer"] == "Stanford's PTB tokenizer (Java)"
    expected = tokens({i: [caption] for i, caption in enumerate(TOKENS)})
    assert [line for (line,) in expected.values()] == list(TOKENS.values())


@needs_java
def test_java_counts_in_english(fake_java, tmp_path, monkeypatch):
    """METEOR fails where Java takes a decimal point for another sign, as in Italian."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=it -Duser.country=IT")
    fake_java(f"exec {JAVA} -XshowSettings:locale -version > {tmp_path}/said 2>&1")
    scoring._run_java(["tokenize"], {"1": ["a dog"]}, {"1": ["a dog"]})
    assert "default locale = English (United States)" in (tmp_path / "said").read_text()


def test_java_that_fails_leaves_the_other_scores(gt_path, fake_java):
    fake_java("exit 1")
    report = score_captions(results(), gt_path)
    assert report["scores"] == pytest.approx(expected_scores(*python_tokens())[0], rel=1e-9)
    assert report["left_out"]["METEOR"].startswith("failed: ")
    assert "failed: RuntimeError: Java gave back more or fewer sentences" in report["tokenizer"]


def test_java_that_hangs_is_ended_at_the_time_limit(fake_java, tmp_path, monkeypatch):
    fake_java(f"echo $$ > {tmp_path}/pid; exec sleep 600")
    monkeypatch.setattr(scoring, "TIMEOUT", 2.0)
    outputs, failures = scoring._run_java(["METEOR"], *python_tokens())
    assert (outputs, failures) == ({}, {"METEOR": "did not finish within 2 s"})
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_results_file_is_scored_again(gt_path, tmp_path, without_java, capsys):
    write_json(tmp_path / "val.json", results())
    score_again(tmp_path / "val.json", {"coco_gt_root": tmp_path}, spice=True)
    expected = score_captions(results(), gt_path, spice=True)
    assert json.loads((tmp_path / "val_images.json").read_text()) == expected.pop("images")
    assert json.loads((tmp_path / "val_scores.json").read_text()) == expected
    assert json.loads((tmp_path / "scores.json").read_text()) == {"val": expected["scores"]}
    printed = capsys.readouterr().out.splitlines()
    starts = [f"val: {json.dumps(expected['scores'])}", "tokens: PTB rules in Python"]
    starts += ["METEOR is left out: needs Java", "SPICE is left out: needs Java"]
    starts += ["note: 1 of 4 captions have no word"]
    assert all(line.startswith(start) for line, start in zip(printed, starts, strict=True))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.json", None, "takes the val.json or test.json of an evaluation"),
        ("val.json", None, "cannot read .*val.json"),
        ("val.json", [{"image_id": 3}], "val.json.* record 0: caption is missing"),
        ("val.json", results()[1:], "made for another split"),
        ("val.json", [*results(), {"image_id": 99, "caption": "a"}], "made for another split"),
        ("val.json", [*results(), results()[0]], "made for another split"),
    ],
)
def test_a_file_that_cannot_be_scored_is_named(file, content, message, gt_path, tmp_path):
    if content:
        write_json(tmp_path / file, content)
    with pytest.raises(UserError, match=message):
        score_again(tmp_path / file, {"coco_gt_root": tmp_path}, spice=False)


def test_line_ends_inside_sentences_do_not_change_scores(gt_path, fake_java):
    """Whatever ends a line in Python is a space to the tokenizers, as this Java sees."""
    fake_java(r"""for last; do :; done; tr '\r\v\f\034\035\036' '\n' < "$last" | tr -s ' '""")
    ends = [chr(code) for code in range(0x110000) if len(f"a{chr(code)}b".splitlines()) > 1]
    assert "".join(ends).translate(scoring.LINE_ENDS) == " " * len(ends)
    expected = score_captions(results(), gt_path, meteor=False)
    content, ends = json.loads(gt_path.read_text()), itertools.cycle([*ends, "\r\n"])
    captions = results()
    for record in content["annotations"] + captions:
        record["caption"] = record["caption"].replace(" ", next(ends), 1)
    write_json(gt_path, content)
    report = score_captions(captions, gt_path, meteor=False)
    assert report["tokenizer"].startswith("Stanford's") and report["scores"] == expected["scores"]
    assert report["images"][0]["caption"] == captions[0]["caption"]  # as written


# Javas that print as many lines as they got, or one in front or in the middle, or too few.
@pytest.mark.parametrize("script", ["cat", "echo; cat", 'sed "2s/ /\\n/"', "sed 1d", "sed '$d'"])
def test_more_or_fewer_lines_than_sentences_are_noticed(script, fake_java):
    fake_java(f'for last; do :; done; {script} "$last"')
    sentences = {"1": ["a dog", "two cats"], "2": [""]}
    if script == "cat":
        assert java.tokenize(sentences, sentences) == [sentences, sentences]
        return
    with pytest.raises(RuntimeError, match="more or fewer"):
        java.tokenize(sentences, sentences)


TWO = {7: ["a dog"], 8: ["a cat"]}


@pytest.mark.parametrize(
    ("references", "captions", "remarks"),
    [
        ({7: ["a dog"]}, ["a dog"], ["CIDEr is 0 for a single image"]),
        (TWO, ["a", "..."], ["1 of 2 captions have no word (images: 8)"]),
        (TWO | {7: ["...", "!"]}, ["a"] * 2, ["the references of 1 of 2 images have no wo"]),
        (REFERENCES, ["a"] * 4, []),
    ],
)
def test_remarks_on_what_scores_do_not_tell(references, captions, remarks, without_java):
    rows = [{"image_id": i, "caption": x} for i, x in zip(references, captions, strict=True)]
    found = scoring.score_captions(rows, references, Path("gt.json"), meteor=False)["remarks"]
    assert [text[: len(start)] for text, start in zip(found, remarks, strict=True)] == remarks
