"""Peak resident memory of extraction and of training one class: a script is run, and its processes are
watched (Linux).

python benchmarks/memory.py train.py --pretrained True --extractor efficientnet_lite0 --class_name cat
"""

import signal
import subprocess
import sys
import time
from pathlib import Path


def tree_memory(pid: int) -> int:
    """Bytes held resident by a process and its descendants, pages that they share counted once (PSS)."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(tree_memory(int(child)) for child in (thread / "children").read_text().split())
    except OSError:
        pass  # it ended in between
    return total


def main():
    arguments = sys.argv[1:]
    seconds = float("inf")
    if arguments[:1] == ["--seconds"]:  # the script is ended after so long
        seconds, arguments = float(arguments[1]), arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    process = subprocess.Popen([sys.executable, *arguments])
    peak, start = 0, time.perf_counter()
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.1)
        if time.perf_counter() - start > seconds:
            process.send_signal(signal.SIGINT)
            process.wait()
    print(
        f"peak resident memory {peak / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s: "
        f"{' '.join(arguments)}"
    )
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
