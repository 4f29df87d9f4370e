import copy

import torch

from nemo.alternatives import granularity as module
from nemo.alternatives.granularity import granularity
from nemo.config import check_params
from nemo.data import parse_subset
from nemo.masking.class_masks import SubsetMasks
from nemo.trained import load_cell
from tests.small import SUBSET, raw_params


def test_whole_heads_are_no_larger_than_the_neurons(vit, monkeypatch, tmp_path):
    _, cell, data, layout = vit
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    passes, cut = [], []
    original, tuned = module.sample_bits, module.tuned
    monkeypatch.setattr(module, "sample_bits", lambda *a: passes.append(1) or original(*a))
    monkeypatch.setattr(module, "tuned", lambda m, *a: cut.append(m.report) or tuned(m, *a))
    asked = {"of": ["nemo"], "subsets": [SUBSET], "thresholds": [0.5, 0.9]}
    rows = granularity(check_params(raw_params("vit_small", granularity=asked)), cell, data, layout)
    assert len(passes) == 1
    sizes = {(row["threshold"], row["granularity"]): row["parameters"] for row in rows}
    assert len(sizes) == len(rows) == len(cut)
    assert {(0.5, "neurons"), (0.5, "heads"), (0.9, "neurons")} <= set(sizes)
    assert sizes[0.9, "neurons"] < sizes[0.5, "neurons"]
    for (threshold, kind), report in zip(sizes, cut, strict=True):
        if kind == "neurons":
            continue
        assert sizes[threshold, kind] <= sizes[threshold, "neurons"]
        for layer, found in report["layers"].items():
            if layer.endswith((".q", ".k", ".v")):
                assert found["kept"] in (0, 8, 16, 24)  # whole heads of 8
            if layer.endswith(".fc1"):
                assert found["kept"] in (0, 96)


class ForCuts:
    """Statistics of BatchNorms, which this model has none of."""

    def ready(self, modular, classes):
        network = copy.deepcopy(modular)
        network.ready_for = classes
        return network


def test_modules_have_the_statistics_that_stage_masks_has_for_them(vit, monkeypatch, tmp_path):
    _, cell, data, layout = vit
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    cut, original = [], module.decompose

    def decompose(network, masks):
        cut.append(getattr(network, "ready_for", None))
        return original(network, masks)

    monkeypatch.setattr(module, "decompose", decompose)
    monkeypatch.setattr(module, "load_for_cuts", lambda *a: ForCuts())
    monkeypatch.setattr(module, "FOR_CUTS", "masks.safetensors")
    monkeypatch.setattr(module, "tuned", lambda *a: {})
    asked = {"of": ["nemo"], "subsets": [SUBSET], "thresholds": [0.5]}
    granularity(check_params(raw_params("vit_small", granularity=asked)), cell, data, layout)
    assert len(cut) > 2
    assert all(classes == parse_subset(SUBSET, data.classes) for classes in cut)


def test_a_model_without_heads_has_no_rows(resnet):
    params, cell, data, layout = resnet
    assert granularity(params, cell, data, layout) == []


def test_there_is_no_module_of_heads_where_not_one_fits(vit):
    _, cell, _, layout = vit
    modular = load_cell(layout.train(cell))
    masks = {layer: torch.ones(neurons).bool() for layer, neurons in modular.layers.items()}
    attention = module._attention(modular)
    assert attention == {"blocks.1.attn.q": 3}
    assert module._heads(modular, SubsetMasks(masks, [0]), attention, 5) is None
