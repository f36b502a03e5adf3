"""The client's profile: which function's time counts as what."""

from __future__ import annotations

from benchmarks.client_profile import REST, group

STACKS = """\
main (app.py);predict (/client/src/convscope/_client.py);_ask (/client/src/convscope/_base.py) 3
main (app.py);send (/client/src/convscope/_rest.py);take (/client/src/convscope/_http.py) 5
main (app.py);run (/lib/asyncio/events.py);write (/lib/asyncio/selector_events.py) 7
main (app.py);run (/lib/asyncio/events.py) 11
main (app.py);read (/client/src/convscope/_reply.py) 13
main (app.py);load (<frozen importlib._bootstrap>);compile (/client/src/convscope/_base.py) 17
 19
main (app.py) 23
"""


def test_a_sample_counts_for_the_innermost_function() -> None:
    found = group(STACKS)
    assert found == {
        "the question": 3,
        "HTTP": 5,
        "sockets": 7,
        "event loop, locks": 11,
        "reading it": 13,
        REST: 23,
    }


def test_imports_and_samples_without_a_stack_are_left_out() -> None:
    assert group(STACKS).total() == 62
