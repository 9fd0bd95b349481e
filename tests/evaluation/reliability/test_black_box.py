"""A model that gives no gradients can be measured, but not believed."""

from pathlib import Path

import torch
from test_diagnosis import CONFIG, THREATS, Split
from torch import Tensor, nn
from toys import Honest

from amsdn.evaluation.cost import pass_seconds
from amsdn.evaluation.reliability.diagnosis import diagnose


class Hidden(nn.Module):
    """Answers as the honest network does, and gives no gradients."""

    black_box = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = Honest()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x)
        return answer


def test_a_black_box_is_not_believed_and_not_attacked_by_gradients(tmp_path: Path) -> None:
    model = Hidden().eval()
    found = diagnose(model, Split(model.inner), tmp_path, THREATS, 10, CONFIG, progress=False)
    told = "no, because the model gives no gradients: it was attacked by queries alone, which break less than gradients would"
    assert {threat: found.verdict(threat) for threat in THREATS} == dict.fromkeys(THREATS, told)
    assert found.as_dict()["threats"].keys() == {"model", *THREATS}


def test_its_passes_have_a_price_all_the_same() -> None:
    price = pass_seconds(Hidden().eval(), torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert price.forward > 0
    assert price.backward == 0
