import compat


def test_torchvision_imports_and_transforms_work():
    import torch
    from torchvision.transforms import functional

    ramp = torch.arange(16.0).reshape(1, 4, 4)
    assert functional.hflip(ramp)[0, 0].tolist() == [3, 2, 1, 0]


def test_operators_are_declared_only_where_the_compiled_ones_are_absent(monkeypatch):
    declared = []
    monkeypatch.setattr(compat.torch.library, "define", lambda name, _: declared.append(name))
    monkeypatch.setattr(compat, "compiled_operators_load", lambda: True)
    assert compat.declare_missing_operators() is False
    assert declared == []
    monkeypatch.setattr(compat, "compiled_operators_load", lambda: False)
    assert compat.declare_missing_operators() is True
    assert declared == ["torchvision::nms", "torchvision::qnms"]


def test_this_process_chose_by_what_it_found():
    assert compat.DECLARED is not compat.compiled_operators_load()
