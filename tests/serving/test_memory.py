"""What keeps a serving process from growing."""

import os
import subprocess
import sys

from embedloom.serving.service import HeapTrimmer, limit_compiled_products

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv(VARIABLE, "7")
    limit_compiled_products()
    assert os.environ[VARIABLE] == "7"


def test_the_limit_reaches_a_library_that_asks_the_c_environment():
    """``getenv`` is what oneDNN calls; Python's own dictionary alone would not reach it."""
    program = (
        "import ctypes\n"
        "from embedloom.serving.service import limit_compiled_products\n"
        "limit_compiled_products()\n"
        "getenv = ctypes.CDLL(None).getenv\n"
        "getenv.restype = ctypes.c_char_p\n"
        f"print(getenv(b'{VARIABLE}').decode())\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    seen = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert seen.stdout.strip() == "64"


def test_libgomp_is_told_how_to_wait_before_it_is_loaded():
    """It reads its environment once; what it read it prints itself. Later than torch's import would be too late."""
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    seen = subprocess.run(
        [sys.executable, "-c", "import embedloom.serving.replica"],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in (seen.stdout + seen.stderr).splitlines() if "GOMP_SPINCOUNT" in line]
    assert lines and all("'20000'" in line for line in lines)


def test_the_heap_is_trimmed_every_ten_seconds():
    times = iter((0.0, 3.0, 9.0, 11.0, 11.0, 12.0, 21.5, 21.5))  # a trim asks twice
    trimmer = HeapTrimmer(lambda: next(times))
    assert [trimmer.after_batch() for _ in range(5)] == [False, False, True, False, True]
