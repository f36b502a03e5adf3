"""Patches eleven classes of TorchServe 0.12, a few bytes each, and adds one. Upstream is archived and gets no fixes.

**safety**: one caller must not stop a worker. TorchServe answers a batch from the worker's own thread, and an exception
while it answers one caller ends that thread. If it has answered other callers of the batch already, a second exception
follows in the clean-up: the worker is neither stopped nor started again, and TorchServe goes on reporting it as ready.

* A gRPC call that is cancelled, or whose deadline passes, just before its reply is such an exception, since TorchServe
  closes the call itself when it hears of the cancellation: 30 s of cancelled calls left a model without an answer for
  good. Patched, it leaves the call to grpc-java, which drops such a reply without an exception; and it finishes a reply
  that it has begun, or the reply's memory would never be freed.
* `StreamPredictions` and `StreamPredictions2` raise such an exception if the handler does not stream. Patched,
  TorchServe's two methods have names that nothing calls, so grpc-java's own methods take their place and answer
  UNIMPLEMENTED.
* TorchServe keeps a request id for each REST connection, and sets it to null when it answers. A request that arrives on
  the connection just before that may have no id. Its batch cannot be written then, and the model answers no request for
  120 s (responseTimeout). Patched, the id stays until the next request has its own. TorchServe does not keep the order
  of the replies to such requests, if they are for several workers or models, and an error closes the
  connection before the others are answered. HTTP clients and the gateway wait for a reply, so they send none.
* The memory of a form that netty cannot read, for instance because a part has no name, is never released: each form
  takes as much of Java's memory outside the heap as it has bytes, until none is left. Patched, netty retains nothing of
  a form while it reads it: TorchServe holds the whole request until it has copied the parts.

**latency**: four things make requests wait.

* The first request of a batch waits all of maxBatchDelay for others, at least a millisecond, even if there are none:
  twice the time that a small network takes. Patched, a worker takes the requests that wait, up to batchSize, at once.
* A batch's reply is read from the worker in pieces of at most 64 KB, and parsed from its beginning again with each.
  Patched, a piece holds all that has arrived: as much as the worker's socket buffer takes (`handlers.entry`).
* A batch is handed to the worker's connection by a task of the JVM's common pool, which waits until it is written; with
  one or two cores the JVM has no such pool and starts a thread for each batch. Patched, the thread that has the batch
  hands it over and goes on. `docs/decisions/0004-batches.md` has the gain of these three.
* Between attempts to start a worker TorchServe pauses for 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, ... s, so a model may
  come back only a minute after the obstacle, such as a full disk, is gone. Patched, no pause is above 13 s.

**blame**: a form that TorchServe cannot read (it breaks off, or a part has no name) is the caller's mistake. TorchServe
answers 500 with a traceback in the log; a gateway retries that, and counts it against the service. Patched, TorchServe
answers any exception while it reads a REST request with 400. Failures of a worker do not pass this place.

**reload**: a version is replaced without losing a request (`server.versions`).

* When a version is unregistered, TorchServe kills its workers, and never answers the requests that they had or that
  waited. Patched, TorchServe forgets the version, leaves its workers, queue and files alone, and does not restart its
  workers: the launcher ends them when they have nothing to do.
* Loading and unloading models can be switched off only for REST and gRPC together. Patched, it stays off for the gRPC
  management API, which any program of this machine can reach. Without this patch it is off for both.

**names**: "Model not found" names the models there are. TorchServe lists its models in its management API alone, which
stays private, so this message is the list for callers (proto/README.md). A class of ours puts it in: it reads a file
that the launcher writes anew whenever it serves other models (`server.watch`). Where that file cannot be read, or is
not UTF-8, the message is TorchServe's own.

Patched classes lie in the private directory and go before the jar on the class path. Each patch is applied whole or not
at all: only if every class that it changes is exactly the one it was written for. `--no-patches` applies none. The
launcher says which are active; `server.watch` restarts a model that hangs without them.

A patch that keeps every exception from ending a worker's thread would need new code in a class, with tables for the
verifier: more than a few bytes. So Java can still lose a worker's thread if it runs out of memory while it answers.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

JAR = Path("ts/frontend/model-server.jar")
MODELS_PROPERTY = "convscope.models"  # Of Java: the file with what "Model not found" says of the models there are.


@dataclass(frozen=True)
class Swap:
    """Bytes to replace.

    Attributes:
        before: The bytes in the class.
        after: The bytes to put there instead: as many, unless they are constants or a method, which state their length.
        times: How often `before` occurs; every occurrence is replaced.
    """

    before: bytes
    after: bytes
    times: int = 1


@dataclass(frozen=True)
class Change:
    """Changes to a class.

    Attributes:
        member: The class file in the jar.
        sha256: Digest of the class that the change was written for.
        edits: What to replace.
    """

    member: str
    sha256: str
    edits: tuple[Swap, ...]


@dataclass(frozen=True)
class Patch:
    """Changes that belong together.

    Attributes:
        name: Its name in the log.
        without: What happens if it is not applied.
        changes: Changes, each to a class.
        added: Our classes that the changed ones call, by the path of the class file.
    """

    name: str
    without: str
    changes: tuple[Change, ...]
    added: Mapping[str, bytes] = field(default_factory=dict)


def _build_pauses(seconds: Sequence[int]) -> bytes:
    """Return the code that writes the ninth to the eighteenth number of an array; four fit in a byte."""
    code = b""
    for place, number in enumerate(seconds):
        value = b"\x10" + number.to_bytes(1) if place < 4 else b"\x11" + number.to_bytes(2)
        code += b"\x59\x10" + (place + 8).to_bytes(1) + value + b"\x4f"
    return code


class _Constants:
    """Constants of a class, written one after the other.

    Args:
        first: Number of the first one, from 1.

    Attributes:
        written: Their bytes.
        next: Number of the next one.
    """

    def __init__(self, first: int) -> None:
        self.written, self.next = b"", first

    def text(self, text: str) -> int:
        """Add text, and return its number, as the methods below do with what they add."""
        return self._add(_constant(text))

    def string(self, text: str) -> int:
        """Add a string, which code can load."""
        return self._add(b"\x08" + self.text(text).to_bytes(2))

    def type(self, name: str) -> int:
        """Add a class."""
        return self._add(b"\x07" + self.text(name).to_bytes(2))

    def method(self, owner: int, name: str, signature: str) -> int:
        """Add a method of a class."""
        pair = self.text(name).to_bytes(2) + self.text(signature).to_bytes(2)
        return self._add(b"\x0a" + owner.to_bytes(2) + self._add(b"\x0c" + pair).to_bytes(2))

    def _add(self, constant: bytes) -> int:
        self.written += constant
        self.next += 1
        return self.next - 1


def _constant(text: str) -> bytes:
    """Return text as a constant of a class."""
    return b"\x01" + len(text).to_bytes(2) + text.encode("ascii")


_LIST = "convscope/Models"
_APPEND = "(Ljava/lang/StringBuilder;Ljava/lang/String;)Ljava/lang/StringBuilder;"


def _build_list() -> bytes:
    """Return a class of Java 8 with one method, which puts the list of models in the place of `%s`.

    static StringBuilder append(StringBuilder message, String text) {
        try {
            Path file = Paths.get(System.getProperty("convscope.models"));
            return message.append(text.replace("%s", Files.readString(file)));
        } catch (Exception unreadable) {
            return message.append(text.replace("%s", ""));
        }
    }
    """
    pool = _Constants(1)
    own, base, string = pool.type(_LIST), pool.type("java/lang/Object"), pool.type("java/lang/String")
    unreadable = pool.type("java/lang/Exception").to_bytes(2)
    name, signature, code, frames = map(pool.text, ("append", _APPEND, "Code", "StackMapTable"))
    place, key, nothing = (pool.string(text).to_bytes(1) for text in ("%s", MODELS_PROPERTY, ""))
    read_property, find_file, read_file, replace, append = (
        pool.method(pool.type(owner), method, takes + gives).to_bytes(2)
        for owner, method, takes, gives in (
            ("java/lang/System", "getProperty", "(Ljava/lang/String;)", "Ljava/lang/String;"),
            ("java/nio/file/Paths", "get", "(Ljava/lang/String;[Ljava/lang/String;)", "Ljava/nio/file/Path;"),
            ("java/nio/file/Files", "readString", "(Ljava/nio/file/Path;)", "Ljava/lang/String;"),
            (
                "java/lang/String",
                "replace",
                "(Ljava/lang/CharSequence;Ljava/lang/CharSequence;)",
                "Ljava/lang/String;",
            ),
            ("java/lang/StringBuilder", "append", "(Ljava/lang/String;)", "Ljava/lang/StringBuilder;"),
        )
    )
    # aload_0, aload_1, ldc; ldc, invokestatic, iconst_0, anewarray, invokestatic, invokestatic; invokevirtual twice,
    # areturn. Where that throws: pop, and the same with the other string.
    begin, end = b"\x2a\x2b\x12" + place, b"\xb6" + replace + b"\xb6" + append + b"\xb0"
    read = b"\x12" + key + b"\xb8" + read_property + b"\x03\xbd" + string.to_bytes(2)
    read += b"\xb8" + find_file + b"\xb8" + read_file
    tried = begin + read + end
    body = tried + b"\x57" + begin + b"\x12" + nothing + end
    caught = len(tried)
    # At most 5 values on the stack and 2 variables, the code, one kind of exception caught: from, to, where, what.
    method = bytes.fromhex("0005 0002") + len(body).to_bytes(4) + body
    method += bytes.fromhex("0001 0000") + 2 * caught.to_bytes(2) + unreadable
    # One attribute, for the verifier: one frame, where the exception alone is on the stack.
    frame = bytes.fromhex("0001") + (64 + caught).to_bytes(1) + b"\x07" + unreadable
    method += bytes.fromhex("0001") + frames.to_bytes(2) + len(frame).to_bytes(4) + frame
    method = code.to_bytes(2) + len(method).to_bytes(4) + method
    return b"".join(
        (
            bytes.fromhex("cafebabe 0000 0034") + pool.next.to_bytes(2) + pool.written,
            bytes.fromhex("0021") + own.to_bytes(2) + base.to_bytes(2),  # Public.
            bytes.fromhex("0000 0000 0001"),  # No interfaces, no fields, one method: public and static, with its code.
            bytes.fromhex("0009") + name.to_bytes(2) + signature.to_bytes(2) + bytes.fromhex("0001") + method,
            bytes.fromhex("0000"),
        )
    )


def _naming(count: int, end: bytes, text: str, call: bytes, times: int = 1) -> tuple[Swap, ...]:
    """Return the replacements that make a class append its text with the method of `_build_list`.

    Args:
        count: Number of constants in the class's head.
        end: Its last constant, and the flags of the class.
        text: What it appends, a constant; with `%s` where the list goes.
        call: The code: what loads the text, 0xb6 and the number of StringBuilder.append, and what comes next.
        times: How often it does so.
    """
    pool = _Constants(count)
    method = pool.method(pool.type(_LIST), "append", _APPEND).to_bytes(2)
    load, _, rest = call.partition(b"\xb6")
    head = bytes.fromhex("cafebabe 0000 0034")
    return (
        Swap(head + count.to_bytes(2), head + pool.next.to_bytes(2)),
        Swap(end, end[:-2] + pool.written + end[-2:]),
        Swap(_constant(text.replace("%s", "")), _constant(text)),
        Swap(call, load + b"\xb8" + method + rest[2:], times),
    )


PATCHES = (
    Patch(
        "safety",
        "a cancelled gRPC call, a call to a streaming method, or a REST request sent before the reply to the previous "
        "one can stop a worker, and forms that cannot be read use up Java's memory",
        (
            # The methods' names; and in the three cancellation handlers (Ping, StreamPredictions2, and all others)
            # responseObserver.onError(Status.CANCELLED.withDescription(...).asRuntimeException()): aload_0, getstatic,
            # ldc_w, invokevirtual, invokevirtual, invokeinterface become nop, and return stays.
            Change(
                "org/pytorch/serve/grpcimpl/InferenceImpl.class",
                "8b85e06f700eeb9dc6e595307bcaf38c67209883a08dcd09039f72f1462e36cc",
                (
                    Swap(b"\x01\x00\x11streamPredictions", b"\x01\x00\x11unusedPredictions"),
                    Swap(b"\x01\x00\x12streamPredictions2", b"\x01\x00\x12unusedPredictions2"),
                    Swap(
                        bytes.fromhex("2a b20198 13019b b6009c b600a7 b900ab0200 b1"),
                        bytes.fromhex(18 * "00" + "b1"),
                        times=3,
                    ),
                ),
            ),
            # In GRPCJob.response, between onNext and onCompleted, if (cancelHandler(observer)) return; becomes
            # if (false) return; aload_0, aload 8, invokespecial, ifeq, return, aload 8, invokevirtual onCompleted.
            Change(
                "org/pytorch/serve/job/GRPCJob.class",
                "37d38e228b6314e854c0ab05d7488eb29ade8239683289b36d027357784058ce",
                (
                    Swap(
                        bytes.fromhex("2a 1908 b700a2 990004 b1 1908 b600ce"),
                        bytes.fromhex("03 0000 000000 990004 b1 1908 b600ce"),
                    ),
                ),
            ),
            # In NettyUtils.sendHttpResponse, attribute.getAndSet(null) becomes attribute.get(): aconst_null,
            # invokeinterface, checkcast; invokeinterface, nop, checkcast.
            Change(
                "org/pytorch/serve/util/NettyUtils.class",
                "705f3daad4559394afa0152e71fc358fc14baab42133c2cc09e3726e11c52933",
                (Swap(bytes.fromhex("01 b900b10200 c00019"), bytes.fromhex("b900130100 00 c00019")),),
            ),
            # In offer(content), content.retainedSlice() becomes Unpooled.unreleasableBuffer(content): aload_2,
            # invokevirtual, goto; aload_2, invokestatic, goto. If the constructor throws, there is no decoder that
            # could release what it retained. Constants are appended, so their count, in the head, grows by five: the
            # class and its name, the method, its name, and its name with the type, which is there already.
            Change(
                "io/netty/handler/codec/http/multipart/HttpPostMultipartRequestDecoder.class",
                "0486f99faef15fafc8062fb82e75965d48c5716ff2d9bb0e3eafec1e1562d7f7",
                (
                    Swap(bytes.fromhex("cafebabe 00000032 034a"), bytes.fromhex("cafebabe 00000032 034f")),
                    # The last constant of all, and the flags of the class.
                    Swap(
                        b"\x01\x00\x28([Ljava/lang/Object;)[Ljava/lang/Object;\x00\x21",
                        b"\x01\x00\x28([Ljava/lang/Object;)[Ljava/lang/Object;"
                        + b"\x01\x00\x18io/netty/buffer/Unpooled"
                        + bytes.fromhex("07 034a")
                        + b"\x01\x00\x12unreleasableBuffer"
                        + bytes.fromhex("0c 034c 02d6  0a 034b 034d  0021"),
                    ),
                    Swap(bytes.fromhex("2c b60040 a7"), bytes.fromhex("2c b8034e a7")),
                ),
            ),
        ),
    ),
    Patch(
        "blame",
        "a form that cannot be read is answered with 500 instead of 400",
        (
            # In HttpRequestHandler.channelRead0, catch (IllegalArgumentException) becomes catch (RuntimeException), and
            # in it logger.error becomes logger.trace and FORBIDDEN becomes BAD_REQUEST: aload_3, invokeinterface,
            # aload_1, getstatic, aload_3, invokestatic sendError.
            Change(
                "org/pytorch/serve/http/HttpRequestHandler.class",
                "4284484a3cbe3c227cec2578dcb44b9ae9c4f1b8cffbccec26e36490803cea31",
                (
                    Swap(
                        b"\x01\x00\x22java/lang/IllegalArgumentException",
                        b"\x01\x00\x1ajava/lang/RuntimeException",
                    ),
                    Swap(
                        bytes.fromhex("2d b900840300 2b b20087 2d b8005e"),
                        bytes.fromhex("2d b900520300 2b b20066 2d b8005e"),
                    ),
                ),
            ),
        ),
    ),
    Patch(
        "latency",
        "a request waits a millisecond for others, large replies are parsed again and again, and a model whose workers "
        "fail to start is retried after ever longer pauses",
        (
            # In Model.pollBatch, where a batch's second and later requests are taken, jobsQueue.poll(maxDelay,
            # MILLISECONDS) becomes poll(0, MILLISECONDS): aload 5, lload 6, getstatic; aload 5, lconst_0, nop,
            # getstatic.
            Change(
                "org/pytorch/serve/wlm/Model.class",
                "7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff",
                (Swap(bytes.fromhex("1905 1606 b2"), bytes.fromhex("1905 0900 b2")),),
            ),
            # The constant 65,536 becomes 4 MiB: the most that netty, used with its defaults, reads at once.
            Change(
                "io/netty/channel/AdaptiveRecvByteBufAllocator.class",
                "0b9f688fa3f189aa5729e811c589f25f9682a1178c0e3974965f0e04b4c58c97",
                (Swap(bytes.fromhex("03 00010000"), bytes.fromhex("03 00400000")),),
            ),
            # In WorkerThread.run, where a batch goes out, futures.add(CompletableFuture.runAsync(() ->
            # lambda$run$0(i))) is now lambda$run$0(i), and in that method channel.writeAndFlush(request).sync() loses
            # its sync(). Nobody looks at those futures: a connection that breaks interrupts this thread, which is then
            # waiting for the reply, as before.
            Change(
                "org/pytorch/serve/wlm/WorkerThread.class",
                "5292f5b79ac1ec509876cd997e2605848fd79f0b15b24ebd1a96c9c6b035ffd6",
                (
                    # aload 8, aload_0, iload 10, invokedynamic, invokestatic runAsync, invokeinterface add, pop.
                    Swap(
                        bytes.fromhex("1908 2a 150a ba01670000 b8016b b901710200 57"),
                        bytes.fromhex("2a 150a b703ed" + 13 * "00"),
                    ),
                    # invokeinterface writeAndFlush, invokeinterface sync, pop.
                    Swap(bytes.fromhex("b903550200 b9027b0100 57"), bytes.fromhex("b903550200 0000000000 57")),
                    # The tail of BACK_OFF, from its ninth number on: dup, bipush index, bipush or sipush, iastore.
                    Swap(_build_pauses((21, 34, 55, 89, 144, 233, 377, 610, 987, 1597)), _build_pauses((13,) * 10)),
                ),
            ),
        ),
    ),
    Patch(
        "reload",
        "no archive is taken in while the server serves (python -m server.reload)",
        (
            # In unregisterModel, model.setMaxWorkers(0) and model.getModelArchive().clean() go; setMinWorkers(0) stays.
            # With none wanted and as many allowed as there are, modelChanged forgets the workers and ends none.
            # aload 5, iconst_0, invokevirtual; aload 5, invokevirtual, invokevirtual.
            Change(
                "org/pytorch/serve/wlm/ModelManager.class",
                "c32ec7d1b524cc3992b068659874274c0611c2472dfe94eaadcabdc14a5c51bf",
                (
                    Swap(bytes.fromhex("1905 03 b6022b 1905 03 b6022e"), bytes.fromhex("1905 03 b6022b" + 6 * "00")),
                    Swap(bytes.fromhex("1905 b6017c b6023c"), bytes.fromhex(8 * "00")),
                ),
            ),
            # getMaxRetryTimeoutInMill returns maxRetryTimeoutInMill * (-minWorkers >>> 31), so 0 where no worker is
            # wanted. Length, stack, locals and length of the code, and the code: aload_0, getfield, aload_0, getfield,
            # ineg, bipush 31, iushr, i2l, lmul, lreturn.
            Change(
                "org/pytorch/serve/wlm/Model.class",
                "7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff",
                (
                    Swap(
                        bytes.fromhex("0000002f 0002 0001 00000005 2a b40009 ad"),
                        bytes.fromhex("00000039 0004 0001 0000000f 2a b40009 2a b40171 74 101f 7c 85 69 ad"),
                    ),
                ),
            ),
            # In registerModel and unregisterModel, configManager.isModelApiEnabled() becomes false: aload_0, getfield,
            # invokevirtual, ifne become aload_0, getfield, pop, iconst_0, nop, ifne.
            Change(
                "org/pytorch/serve/grpcimpl/ManagementImpl.class",
                "1bf8432f89c3108f0cd47ae0b1eb1f65ce807279f302b34b7697885c32a193ac",
                (Swap(bytes.fromhex("2a b4000d b600a1 9a"), bytes.fromhex("2a b4000d 570300 9a"), times=2),),
            ),
        ),
    ),
    Patch(
        "names",
        "'Model not found' does not name the models there are",
        (
            # new StringBuilder().append("Model not found: ").append(name): the first append is ours. ldc,
            # invokevirtual, aload 4; the number of InferenceImpl's constants is that of the class as it was.
            Change(
                "org/pytorch/serve/http/api/rest/InferenceRequestHandler.class",
                "915ac25d1f8a2360181528aa8eabd3c769ebd807d54798f0bce9bc934213eb93",
                _naming(590, b"\x01\x00\x06Lookup\x00\x21", "Model not found%s: ", bytes.fromhex("12e1 b600e3 1904")),
            ),
            Change(
                "org/pytorch/serve/grpcimpl/InferenceImpl.class",
                "8b85e06f700eeb9dc6e595307bcaf38c67209883a08dcd09039f72f1462e36cc",
                _naming(599, b"\x01\x00\x06Lookup\x00\x21", "Model not found%s: ", bytes.fromhex("12e8 b600ea 1904")),
            ),
            # "Model version: " + version + " does not exist for model: " + name, in two methods: ldc_w, invokevirtual,
            # aload_1.
            Change(
                "org/pytorch/serve/wlm/ModelManager.class",
                "c32ec7d1b524cc3992b068659874274c0611c2472dfe94eaadcabdc14a5c51bf",
                _naming(
                    900,
                    b"\x01\x00\x05Entry\x00\x31",
                    "%s does not exist for model: ",
                    bytes.fromhex("130279 b6012d 2b"),
                    times=2,
                ),
            ),
        ),
        added={f"{_LIST}.class": _build_list()},
    ),
)


def apply(home: Path, folder: Path) -> list[str]:
    """Write the patched classes into a folder for the front of the class path.

    Args:
        home: Where TorchServe is installed.
        folder: Folder to write to, created if missing.

    Returns:
        The names of the patches that were applied; the others are for another TorchServe than this one.
    """
    changed = {change.member for patch in PATCHES for change in patch.changes}
    with zipfile.ZipFile(home / JAR) as jar:
        classes = {member: jar.read(member) for member in changed.intersection(jar.namelist())}
    digests = {member: hashlib.sha256(content).hexdigest() for member, content in classes.items()}
    applied = [
        patch for patch in PATCHES if all(digests.get(change.member) == change.sha256 for change in patch.changes)
    ]
    patched: dict[str, bytes] = {}
    for patch in applied:
        patched |= patch.added
        for change in patch.changes:
            content = patched.get(change.member, classes[change.member])  # Two patches may change the same class.
            for edit in change.edits:
                content = content.replace(edit.before, edit.after)
            patched[change.member] = content
    for member, content in patched.items():
        path = folder / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [patch.name for patch in applied]
