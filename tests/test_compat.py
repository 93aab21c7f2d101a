"""torchvision beside a CPU-only torch."""

import compat


def test_operators_are_declared_only_where_the_compiled_ones_do_not_load(monkeypatch):
    def broken(library):
        raise OSError("no CUDA")

    declared = []
    monkeypatch.setattr(compat.torch.library, "define", lambda name, _: declared.append(name))
    monkeypatch.setattr(compat.torch.ops, "load_library", lambda library: None)
    assert compat.declare_missing_operators() is False and declared == []
    monkeypatch.setattr(compat.torch.ops, "load_library", broken)
    assert compat.declare_missing_operators() is True
    assert declared == ["torchvision::nms", "torchvision::qnms"]
