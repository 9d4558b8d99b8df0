from __future__ import annotations

import torch

from stdit.diffusion.guidance import guide
from stdit.sampling.request import SampleRequest


def test_guidance():
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert guide(cond, uncond, 5).tolist() == [5.0, -6.0]
    assert torch.equal(guide(cond, uncond, 1), cond)
    assert torch.equal(guide(cond, uncond, 0), uncond)
    assert guide(cond, uncond, 4, beyond=True).tolist() == guide(cond, uncond, 5).tolist()  # as Cosmos counts
    assert SampleRequest(["a circle"], guidance=1.5).guided and not SampleRequest(["a circle"], guidance=1.0).guided
