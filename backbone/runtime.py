"""A frozen module on a CPU by OpenVINO, which computes the same more quickly than PyTorch does."""

import queue
import warnings

import torch
from torch import Tensor, nn

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}  # that it computes in
FARTHEST = {torch.float32: 0.005, torch.bfloat16: 0.3}  # from PyTorch's numbers, in shares of the largest


class Compiled:
    """A module compiled for inputs of one shape. Several threads may call it at the same time, each by a
    stream of its own: a share of the processor's threads."""

    def __init__(self, module: nn.Module, images: Tensor, dtype: torch.dtype, streams: int, threads: int):
        """images: an example, on which the outcome is compared with the module's. Raises what OpenVINO and
        PyTorch raise of a module that they cannot convert, and ValueError where the outcome differs."""
        from openvino import Core
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        with warnings.catch_warnings(), torch.no_grad():
            # Before the trace: matrices that are kept for a size are constants then.
            expected = module(images[-1:])
            # That it is deprecated, and of shapes taken for constants, as they are.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(module, images[:1], check_trace=False)
        # Not openvino.convert_model, which sends usage statistics. The decoder has to outlive the conversion.
        frontend, decoder = FrontEndManager().load_by_framework("pytorch"), TorchScriptPythonDecoder(traced)
        model = frontend.convert(frontend.load(decoder))
        model.reshape(list(images.shape))
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],  # its own choice is bfloat16 where that is quick
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # another program may be on that core
        }
        compiled = Core().compile_model(model, "CPU", settings)
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(compiled.create_infer_request())
        for wanted, found in zip(expected, self(images)):
            far = FARTHEST[dtype] * wanted.abs().max().item()
            if not torch.allclose(found[-1:].float(), wanted.float(), rtol=0, atol=far):
                raise ValueError("it computes other numbers")

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the module gives of images of the example's shape and type."""
        request = self._requests.get()
        try:
            outputs = request.infer([images.contiguous().numpy()], share_inputs=True)
            return tuple(torch.from_numpy(values) for values in outputs.values())
        finally:
            self._requests.put(request)
