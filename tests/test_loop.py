"""The training loop: the spread of a batch does not change the result, bad losses are named."""

import json
import math
from itertools import count

import pytest
import torch

import train_caption
from data.samplers import TrainBatchSampler
from engine.loop import is_best
from models import Captioner, vit
from tests.runs import finish, make_scenes, result, same, start, write_config


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


def test_best_epoch_is_one_at_the_final_ratio():
    def epoch(ratio, score):
        return {"remaining_ratio": ratio, "accuracy": score}

    dense, pruned = epoch(1.0, 0.9), epoch(0.2, 0.5)
    assert not is_best(dense, [], "accuracy", final_ratio=0.2)
    assert is_best(pruned, [dense], "accuracy", final_ratio=0.2)
    assert not is_best(epoch(0.2, 0.4), [dense, pruned], "accuracy", final_ratio=0.2)
    assert not is_best({"remaining_ratio": 0.2}, [dense], "accuracy", final_ratio=0.2)


def test_result_does_not_depend_on_the_spread_of_a_batch(tmp_path, scenes):
    """Captions differ in length, so a mean of means would give another loss."""
    config = write_config(tmp_path / "config.yaml", scenes, dropout=0.0, max_epoch=2)

    def run(name, world_size, *flags):
        argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", name]
        argv += ["--final_threshold", "1", "--eval_epochs", "0", *flags]
        if world_size == 1:
            train_caption.main(train_caption.parse_args(argv))
        else:
            assert finish(start(argv, world_size)) == [0] * world_size
        log = (tmp_path / name / "log.txt").read_text().splitlines()
        return [json.loads(line)["loss"] for line in log], result(tmp_path / name)

    losses, weights = run("one", 1, "--batch_size", "4")
    for other, other_weights in [
        run("accumulated", 1, "--batch_size", "2", "--gradient_accumulation_steps", "2"),
        run("two", 2, "--batch_size", "2"),
        run("both", 2, "--batch_size", "1", "--gradient_accumulation_steps", "2"),
    ]:
        assert other == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            # a bias of keys has no gradient but rounding errors, which AdamW blows up
            if not name.endswith(("key.bias", "qkv.bias")):
                torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-4)


def test_recomputed_blocks_change_nothing(tmp_path, scenes, monkeypatch):
    """With drop path, so that recomputation must restore the random state."""
    recomputed = []
    checkpoint_seq = vit.checkpoint_seq
    monkeypatch.setattr(
        vit, "checkpoint_seq", lambda b, x: recomputed.append(len(b)) or checkpoint_seq(b, x)
    )
    for name, layers in [("plain", {}), ("one", {"vit_grad_ckpt": True, "vit_ckpt_layer": 1})]:
        config = write_config(tmp_path / f"{name}.yaml", scenes, max_epoch=1, **layers)
        argv = ["--config", config, "--output_dir", str(tmp_path), "--model_dir", name]
        train_caption.main(
            train_caption.parse_args([*argv, "--final_threshold", "1", "--eval_epochs", "0"])
        )
    assert recomputed == [1] * 24
    assert same(result(tmp_path / "plain"), result(tmp_path / "one"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_that_is_not_finite_names_its_images(tmp_path, scenes, monkeypatch, accumulation):
    argv = ["--config", write_config(tmp_path / "c.yaml", scenes), "--output_dir", str(tmp_path)]
    argv += ["--gradient_accumulation_steps", str(accumulation), "--checkpoint_steps", "4"]
    args = train_caption.parse_args([*argv, "--warmup_steps", "2"])
    forward, calls = Captioner.forward, count(1)

    def bad_at_sixth_step(self, *inputs):
        step = math.ceil(next(calls) / accumulation)
        return forward(self, *inputs) * (math.nan if step == 6 else 1)

    monkeypatch.setattr(Captioner, "forward", bad_at_sixth_step)
    with pytest.raises(FloatingPointError) as raised:
        train_caption.main(args)
    message = str(raised.value)
    assert "the loss of step 6 is nan" in message and "step_00000004.pt" in message
    named = message.split("Images of the step: ")[1].split(". Last checkpoint")[0].split(", ")
    annotation = json.loads((scenes / "annotation/coco_karpathy_train.json").read_text())
    order = [
        index for batch in TrainBatchSampler(len(annotation), 2, args.seed) for index, _ in batch
    ]
    samples = 2 * accumulation
    expected = [annotation[i]["image"] for i in order[5 * samples : 6 * samples]]
    assert [name.rpartition("/images/")[2] for name in named] == expected
