"""Request lines are written together, soon, and all of them."""

import asyncio
import io
import logging

from embedloom.serving.front import LineBuffer


class Stream(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


def record(number: int) -> logging.LogRecord:
    return logging.LogRecord("requests", logging.INFO, "f.py", 1, "line %d", (number,), None)


def test_lines_of_a_moment_are_one_write_and_later_ones_another():
    stream = Stream()
    buffer = LineBuffer(stream)

    async def run():
        for number in range(3):
            buffer.handle(record(number))
        assert stream.writes == []
        await asyncio.sleep(0.3)
        assert stream.writes == ["line 0\nline 1\nline 2\n"]
        buffer.handle(record(3))
        await asyncio.sleep(0.3)

    asyncio.run(run())
    assert stream.writes == ["line 0\nline 1\nline 2\n", "line 3\n"]


def test_what_is_kept_when_the_process_ends_is_written_then():
    stream = Stream()
    buffer = LineBuffer(stream)

    async def run():
        buffer.handle(record(0))
        buffer.handle(record(1))

    asyncio.run(run())
    logging.shutdown([lambda: buffer])
    assert stream.writes == ["line 0\nline 1\n"]


def test_without_an_event_loop_a_line_is_written_at_once():
    stream = Stream()
    LineBuffer(stream).handle(record(7))
    assert stream.writes == ["line 7\n"]
