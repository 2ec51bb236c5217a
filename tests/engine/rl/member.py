"""One process of a run of reinforcement learning."""

import torch

from tests.processes import join_run
from warploom.engine.rl.trainer import run_reinforce


def main(rank, size, port, config):
    join_run(rank, size, port)
    run_reinforce(config)


def alone(config, threads):
    torch.set_num_threads(threads)
    run_reinforce(config)
