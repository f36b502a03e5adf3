"""Reading from Java's thread dump and the kernel's tables what is in flight."""

import socket

from server.draining import count_busy_workers, unsent_bytes

IDLE = """
"W-9000-a_1.0" #16 prio=5 waiting on condition
   java.lang.Thread.State: TIMED_WAITING (parking)
\tat org.pytorch.serve.wlm.Model.pollBatch(Model.java:482)
\tat org.pytorch.serve.wlm.BatchAggregator.getRequest(BatchAggregator.java:36)
\tat org.pytorch.serve.wlm.WorkerThread.run(WorkerThread.java:195)

"""
BUSY = """
"W-9001-b_1.0" #17 prio=5 waiting on condition
   java.lang.Thread.State: TIMED_WAITING (parking)
\tat java.util.concurrent.ArrayBlockingQueue.poll(java.base@17.0.15/ArrayBlockingQueue.java:435)
\tat org.pytorch.serve.wlm.WorkerThread.run(WorkerThread.java:234)

"""
STARTING = BUSY.replace(
    "ArrayBlockingQueue.poll(", "CountDownLatch.await(X.java:1)\n\tat org.pytorch.serve.wlm.WorkerThread.connect("
)
OTHER = """
"W-9000-a_1.0-stdout" #25 runnable
\tat java.io.FileInputStream.readBytes(Native Method)

"main" #1
\tat x.run(
"""


def test_a_worker_that_waits_for_a_request_is_not_busy_and_one_that_waits_for_its_backend_is():
    assert count_busy_workers(IDLE + OTHER) == 0
    assert count_busy_workers(IDLE + BUSY + OTHER + BUSY) == 2


def test_a_worker_that_is_being_started_has_no_request():
    assert count_busy_workers(STARTING) == 0


def test_a_reply_the_caller_has_not_taken_counts_as_unsent():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller:
            server, _ = listener.accept()
            with server:
                assert unsent_bytes(port) == 0
                server.setblocking(False)
                try:
                    while True:
                        server.send(b"x" * 65536)
                except BlockingIOError:
                    pass
                assert unsent_bytes(port) > 0
                caller.close()
