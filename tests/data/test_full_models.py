"""Methods with data on models fine-tuned in full: the statistics of the models themselves, by the layers' names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertModel

from dc_merge_peft import DCMergeAdapter, OptionError, statistics
from tests.support.full import write_models
from tests.support.models import bert, difference
from tests.support.versions import needs_v5

pytestmark = pytest.mark.filterwarnings("ignore::dc_merge_peft.MergeWarning")
IDS = torch.tensor([[1, 5, 9, 2, 30, 7], [4, 4, 11, 20, 3, 8]])


def logits(model: BertModel, batch: torch.Tensor) -> torch.Tensor:
    """A head of three classes; behind the pooler, so that every layer counts."""
    return model(batch).pooler_output[:, :3]


@needs_v5
@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_full_models(name: str, tmp_path: Path) -> None:
    """Linear layers by the rule, embeddings averaged when asked; without statistics the dry run is refused."""
    base, models = write_models(tmp_path, bert(), 2)
    before = BertModel.from_pretrained(base)
    layers = [path for path, layer in before.named_modules() if isinstance(layer, torch.nn.Linear)]
    tuned = [BertModel.from_pretrained(model) for model in models]
    collect = statistics.fisher if name == "fisher" else statistics.input_grams
    given = [collect(model, [IDS], modules=layers, forward=logits) for model in tuned]
    average = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    with pytest.raises(OptionError, match=f"'{name}' needs"):
        DCMergeAdapter(method=name).plan_full(base, models, average=average)
    DCMergeAdapter(method=name, statistics=given).merge_full(
        base, models, tmp_path / "out", average=average, progress=False
    )
    merged, W = BertModel.from_pretrained(tmp_path / "out"), "encoder.layer.0.output.dense"
    deltas = [
        (model.get_parameter(f"{W}.weight") - before.get_parameter(f"{W}.weight")).detach().double() for model in tuned
    ]
    if name == "fisher":
        F = [part.tensors[W].double() for part in given]
        F = [part.clamp(min=1e-6 * float((F[0].mean() + F[1].mean()) / 2)) for part in F]
        expected = (F[0] * deltas[0] + F[1] * deltas[1]) / (F[0] + F[1])
    else:
        G = [0.9 * part.tensors[W].double() + 0.1 * torch.diag(part.tensors[W].double().diagonal()) for part in given]
        expected = (deltas[0] @ G[0] + deltas[1] @ G[1]) @ torch.linalg.inv(G[0] + G[1])
    found = merged.get_parameter(f"{W}.weight") - before.get_parameter(f"{W}.weight")
    assert difference(found.detach(), expected) < 1e-4
    fitted = DCMergeAdapter(method=name, statistics=given, alpha="auto")
    done = fitted.merge_full(base, models, tmp_path / "auto", average=average, progress=False)
    assert (done.merged.alpha == 1.0) == (name == "regmean")
