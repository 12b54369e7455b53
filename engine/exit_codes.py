"""Exit codes of a command that did not succeed."""

import signal

MISTAKE = 2  # the input is wrong, and one sentence says what and why
INTERRUPTED = 128 + signal.SIGINT  # 128 + the number of the signal, as in shells
TERMINATED = 128 + signal.SIGTERM
SIGNALS = {  # signal -> exit code; it is never 0, so a scheduler starts the job again
    signal.SIGINT: INTERRUPTED,
    signal.SIGTERM: TERMINATED,
    signal.SIGUSR1: 128 + signal.SIGUSR1,
}
