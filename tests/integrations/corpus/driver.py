"""The command line, which is sent a signal after so many commits.

``python -m tests.integrations.corpus.driver SIGNAL COUNT encode ...``
"""

import os
import signal
import sys

from merv_fast.cli import main
from merv_fast.integrations.corpus.folder import CorpusFolder

if __name__ == "__main__":
    number, count = signal.Signals[sys.argv[1]], int(sys.argv[2])
    commit = CorpusFolder.commit

    def commit_and_stop(self, rows):
        global count
        done, count = commit(self, rows), count - 1
        if not count:
            os.kill(os.getpid(), number)
        return done

    CorpusFolder.commit = commit_and_stop
    sys.argv = ["merv-fast", *sys.argv[3:]]
    main()
