"""How a process's malloc treats large tensors on a CPU: keeps what is freed, and asks for huge pages. Without torch.

By default each large activation is mapped and unmapped anew, and its pages are zeroed and faulted in each time, 4 KB by
4 KB. EfficientNet-B0 at 224 px, batch 50, compiled float32, two threads (`python -m benchmarks.step_memory --seconds 7`): 12.2
images a second by default, 21.1 with freed memory kept, 22.6 with huge pages too. Labeling with EfficientNet-Lite0 in eager
bfloat16, batch 16, was 1.5 times as fast with freed memory kept; huge pages added nothing there.
"""

import contextlib
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BYTES, NEVER = 1 << 30, -1
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"


def keep_freed_memory() -> None:
    """Have this process's malloc keep what is freed, blocks of up to 1 GB (glibc; elsewhere nothing happens).

    What a batch needs stays the bound. Nothing is given back from the top either: after a step, when all activations are
    free, they may lie there in one piece, and would be faulted in again at the next.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def ask_for_huge_pages(environment: dict[str, str]) -> None:
    """Set what a child's malloc reads at its start, unless the user has said something about it (glibc 2.35 and newer)."""
    said = environment.get(TUNABLES, "")
    if HUGE_PAGES not in said:
        environment[TUNABLES] = ":".join(filter(None, [said, f"{HUGE_PAGES}=1"]))
