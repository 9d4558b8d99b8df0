"""One of several processes that share packs by gloo; rank 0 compares them with the whole packs on one rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from stdit.models.sequence import SequenceGroup

sys.path.append(str(Path(__file__).parents[1] / "shared"))
from shared_packs import PACKS, WAN, joined, of_part, of_whole, random_model


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = SequenceGroup.join(dist.get_world_size())
    assert group is not None and group.rank == dist.get_rank()
    model = random_model(WAN)
    for shapes in PACKS.values():
        pack = joined(WAN, shapes)
        out, gradients = of_part(model, pack, group)
        for gradient in gradients:
            dist.all_reduce(gradient)
        parts = [torch.empty(count, out.shape[1], dtype=out.dtype) for count in group.shares(len(pack.tokens.tokens))]
        dist.all_gather_object(parts, out.detach())
        if group.rank == 0:
            expected, wanted = of_whole(model, pack)
            for found, one in zip((torch.cat(parts), *gradients), (expected.detach(), *wanted)):
                assert float((found - one).norm()) <= 1e-12 * float(torch.cat([w.flatten() for w in wanted]).norm())
    if group.rank == 0:
        print(f"{group.size} ranks: equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
