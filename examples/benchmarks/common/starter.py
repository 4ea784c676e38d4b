"""Starts a command and prints its wall time, processor time and largest resident memory as JSON.

A process of its own, without torch: a process that is started counts the memory of the one that starts it.
"""

import json
import os
import subprocess
import sys
import time

if __name__ == "__main__":
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps([process.returncode, seconds, usage.ru_utime + usage.ru_stime, peak]))
