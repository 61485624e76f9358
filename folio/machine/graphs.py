"""CUDA graphs: the kernels of a function, recorded once and then launched together.

A step of a small model, or of sampling, is hundreds of kernels, each of which may take less time than its launch from
Python. A recorded graph is launched at once. torch.cuda.graphs; NVIDIA, "CUDA C++ Programming Guide", CUDA Graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from folio.machine import shortage

_WARM_UPS = 2  # calls before the recording: they compile, choose kernels and reserve the libraries' memory


class RecordingError(Exception):
    """A function cannot be recorded as a graph."""


class Replay:
    """``function`` of tensors of fixed shapes, from its recording on one graph; before, or on a CPU, it is called.

    A call copies its arguments to where the graph reads them, and returns a tensor that the next call overwrites. The
    function must launch the same kernels at each call and never wait for the device, and what it changes besides its
    result must stay at its address.
    """

    def __init__(self, function: Callable[..., Tensor], *arguments: Tensor) -> None:
        self._function = function
        self._arguments = [t.clone(memory_format=torch.contiguous_format) for t in arguments]
        self._result: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def takes(self, *arguments: Tensor) -> bool:
        """Whether the arguments have the shapes of the first ones."""
        return [t.shape for t in arguments] == [t.shape for t in self._arguments]

    def __call__(self, *arguments: Tensor) -> Tensor:
        for here, new in zip(self._arguments, arguments, strict=True):
            here.copy_(new)
        if self._graph is not None:
            self._graph.replay()
        else:
            self.run()
        assert self._result is not None
        return self._result

    def run(self) -> None:
        """Calls the function, on a GPU without its graph."""
        result = self._function(*self._arguments)
        self._result = result if self._result is None else self._result.copy_(result)

    def record(self, pool: tuple[int, int]) -> None:
        """Records the function on the current stream; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        # other threads may pin memory meanwhile
        how = {"stream": torch.cuda.current_stream(), "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool, **how):  # type: ignore[arg-type]
            self._result = self._function(*self._arguments)
        self._graph = graph


class Recorder:
    """Records replays that share their memory, so they must run in turn, and in the order of their recording.

    On a CPU it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if self._stream else (0, 0)

    def record(self, replay: Replay, warm_up: Callable[[], object] | None) -> None:
        """Records a replay after two calls of ``warm_up``; the device's random generator stays as it is.

        Raises:
            RecordingError: the recording failed. What ``warm_up`` raises is passed on.
        """
        if self._stream is None:
            return
        before, state = torch.cuda.current_stream(), torch.cuda.get_rng_state(self._device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                for call in [warm_up] * _WARM_UPS if warm_up else []:
                    call()
                _record(replay, self._pool)
        finally:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own
            before.wait_stream(self._stream)
            torch.cuda.set_rng_state(state, self._device)


def _record(replay: Replay, pool: tuple[int, int]) -> None:
    try:
        replay.record(pool)
    except RuntimeError as error:
        if shortage.is_shortage(error):
            raise
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        fresh = torch.Generator(generator.device)  # the old one still believes that it is recorded
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise RecordingError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


class StepGraphs:
    """The micro steps and the update of a training step as graphs, in one process.

    The first micro step of a step has its own graph: it makes the gradients, as it does without graphs, and later ones
    add to them. The gradients then stay where they are, in memory that the activations use before. Each real micro step
    and update is a replay; the calls before the recording leave no trace. If a recording fails or a shape changes, one
    warning appears, and from then on the functions are called.
    """

    def __init__(self, device: torch.device, parameters: Iterable[nn.Parameter]) -> None:
        self.active = True
        self._parameters = list(parameters)
        self._recorder = Recorder(device)
        self._first: Replay | None = None
        self._later: Replay | None = None
        self._update: Replay | None = None
        self._begun = False  # whether this step has gradients already

    def micro_step(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        """``function(*arguments)``, which adds to the gradients, and after an update replaces them."""
        try:
            return self._micro_step(function, *arguments)
        except RecordingError as error:
            self._give_up(error)
            return function(*arguments)

    def _micro_step(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        replay = self._later if self._begun else self._first
        if replay is None:
            replay = self._record_micro_step(function, *arguments)
        elif not replay.takes(*arguments):
            raise RecordingError(f"the shape {tuple(arguments[0].shape)} is new")
        self._begun = True
        return replay(*arguments)

    def _record_micro_step(self, function: Callable[..., Tensor], *arguments: Tensor) -> Replay:
        if self._begun:  # a warm-up would change the gradients, and the kernels are those of the first micro step
            self._later = Replay(function, *arguments)
            self._recorder.record(self._later, None)
            return self._later

        def afresh(*arguments: Tensor) -> Tensor:
            self._drop_gradients()
            return function(*arguments)

        def warm_up() -> None:
            first.run()
            self._drop_gradients()

        first = self._first = Replay(afresh, *arguments)
        self._recorder.record(first, warm_up)
        return first

    def update(self, function: Callable[[Tensor], Tensor], loss: Tensor, warm_up: Callable[[Tensor], object]) -> Tensor:
        """``function(loss)``, which reads the gradients; ``warm_up`` launches its kernels and changes nothing."""
        try:
            if self._update is None:
                self._update = Replay(function, loss)
                self._recorder.record(self._update, lambda: warm_up(loss))
            result = self._update(loss)
        except RecordingError as error:
            self._give_up(error)
            result = function(loss)
            self._drop_gradients()
        self._begun = False
        return result

    def begin_step(self) -> None:
        """The next micro step is the first of a step, and replaces the gradients."""
        self._begun = False

    def _give_up(self, error: RecordingError) -> None:
        warnings.warn(f"CUDA graphs failed, continuing without them: {error}", stacklevel=4)
        self.stop()

    def stop(self) -> None:
        """From here on the functions are called."""
        self.active = False
        self._first = self._later = self._update = None
        if not self._begun:
            self._drop_gradients()

    def _drop_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None


def read_later(tensor: Tensor) -> Callable[[], list[Any]]:
    """Starts to copy a tensor to the CPU, and returns a function that waits for the copy, not for later work.

    What is launched afterwards may overwrite the tensor.
    """
    if tensor.device.type != "cuda":
        return tensor.clone().tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def read() -> list[Any]:
        done.synchronize()
        return host.tolist()

    return read
