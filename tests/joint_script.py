"""Run by torchrun in two processes: whole runs of SFT and DPO, stock and patched, where one rank's pack takes fewer micro-batches than the other's."""
import sys

import torch.distributed as dist
from parity import relative
from test_joint import Joint, make, patches, trained

counts, init = [], Joint.__init__


def counted(self, step, packs, read, jobs, first):
    counts.append(len(jobs))
    return init(self, step, packs, read, jobs, first)


Joint.__init__ = counted
for algorithm, room in (("sft", (120, 2000)), ("dpo", (200, 2000)), ("sft", (2000, 2000))):
    runs = []
    for on in (False, True):
        trainer = make(algorithm, sys.argv[1], ddp_find_unused_parameters=False)
        trainer.args.max_tokens_per_pack = room[trainer.accelerator.process_index]
        assert trainer.accelerator.num_processes == 2
        if not on: runs.append(trained(trainer)[0])
        else:
            counts.clear()
            with patches(algorithm): runs.append(trained(trainer)[0])
    assert len(runs[0]) == len(runs[1]) == 2
    for g, h in zip(*runs): assert relative(g, h) < 1e-5, (algorithm, relative(g, h))
    every = [None, None]
    dist.all_gather_object(every, list(counts))
    assert every[0] == every[1] and every[0], every
    if dist.get_rank() == 0: print(f"{algorithm} {room}: joint forwards agree, {every[0]}", flush=True)
dist.destroy_process_group()
