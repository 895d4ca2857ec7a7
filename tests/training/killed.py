"""A run that is killed in the middle of a step: ``python -m tests.training.killed DATA OUT STEP``."""

import os
import signal
import sys

from merv_fast.training import MervTrainer, train
from tests.training.small import QUICK, small_model
from tests.training.test_training import RESUMED


def main(data: str, out: str, step: int) -> None:
    plain = MervTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **kwargs)

    MervTrainer.compute_loss = compute_loss
    train(small_model(), "finetune", data, out, arguments=QUICK | RESUMED)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
