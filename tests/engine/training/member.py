"""One process of a run."""

from tests.processes import join_run
from warploom.engine.training import train


def main(rank, size, port, config):
    join_run(rank, size, port)
    train(config)
