"""How the benchmark of several workers counts bytes; no timings."""

import socket
import sys
import threading

import pytest

from benchmarks._measure import Spread
from benchmarks.workers import bytes_beside, efficiency, sent_bytes
from pefomed_ray.training.ranks import Traffic

SENT = 3_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of bytes is Linux's")
def test_bytes_are_counted_where_they_are_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            before = sent_bytes()
            sender = threading.Thread(target=one.sendall, args=(bytes(SENT),))
            sender.start()
            left = SENT
            while left:
                left -= len(other.recv(left))
            sender.join()
            # Both ends are this process's: what is received is not counted a second time.
            assert sent_bytes() - before == SENT


def test_measured_bytes_stand_beside_those_of_the_strategy_in_use() -> None:
    assert bytes_beside(110.0, Traffic("ddp", fsdp_bytes=1000, ddp_bytes=100)) == {
        "measured": 110,
        "predicted": 100,
        "ratio": 1.1,
    }
    assert bytes_beside(110.0, Traffic("fsdp", fsdp_bytes=1000, ddp_bytes=100))["ratio"] == 0.11
    assert bytes_beside(0.0, Traffic("alone", fsdp_bytes=1000, ddp_bytes=100))["predicted"] == 0


def test_two_workers_that_are_one_and_a_half_times_as_fast_do_three_quarters_each() -> None:
    assert efficiency(Spread(1.5, 1.4, 1.6, 5)) == 0.75
