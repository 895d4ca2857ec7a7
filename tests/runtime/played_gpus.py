"""GPUs played on the CPU: tensors that say which one they are on, and streams that check the order of all that is done.

Every op computes what it would on a CPU, so that results can be compared bit for bit.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CPU = torch.device("cpu")


class PlayedGpus(TorchFunctionMode):
    """What ``Streams`` says of several GPUs; within the context, tensors can be moved to them.

    Vector clocks: a stream knows how far every other one was when it last waited for it, or for one that had. A copy
    between two GPUs is PyTorch's: on the current stream of the source, which waits for that of the target and is waited
    for by it.

    Attributes:
        copies: (source, target, bytes) of every copy between devices, in order.
        ran: streams on which something was computed.
    """

    def __init__(self):
        super().__init__()
        self.clocks, self.now = {}, {}
        self.written, self.allocated, self.kept, self.weights = {}, {}, set(), set()
        self.copies, self.ran = [], []

    def __enter__(self):
        # Instead of writing into a parameter, which would stay on the CPU, moving a module makes a new one.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        super().__exit__(*error)

    def current(self, device):
        assert device.type == "cuda"
        return self.stream(device, self.now.get(device, "caller"))

    def side(self, device, number):
        return self.stream(device, number)

    def stream(self, device, number):
        self.clocks.setdefault((device, number), {})
        return device, number

    @contextmanager
    def use(self, stream):
        device, number = stream
        before, self.now[device] = self.now.get(device, "caller"), number
        try:
            yield
        finally:
            self.now[device] = before

    def wait(self, waiting, awaited):
        mine, theirs = self.clocks[waiting], self.clocks[awaited]
        for name, count in theirs.items():
            mine[name] = max(mine.get(name, 0), count)

    def keep(self, tensor, stream):
        if isinstance(tensor, Played):
            assert tensor.device == stream[0], f"memory of {tensor.device} is kept for a stream of {stream[0]}"
            self.kept.add((address(tensor), stream))

    def awaited(self, stream):
        """Streams on which something was computed that ``stream`` has waited for."""
        return {other for other in self.ran if other != stream and self.clocks[stream].get(other)}

    def reads(self, tensor, stream):
        key = address(tensor)
        writer, count = self.written[key]
        done = writer == stream or self.clocks[stream].get(writer, 0) >= count
        assert done, f"{stream} does not wait for {writer}"
        kept = stream == self.allocated[key] or (key, stream) in self.kept or key in self.weights
        assert kept, f"memory of {self.allocated[key]} may go while {stream} reads"

    def writes(self, tensor, stream, allocated=None):
        key = address(tensor)
        self.clocks[stream][stream] = self.clocks[stream].get(stream, 0) + 1
        self.written[key] = stream, self.clocks[stream][stream]
        if allocated is not None:
            self.allocated[key] = allocated
            # An address may have been that of another tensor before.
            self.kept = {(other, its) for other, its in self.kept if other != key}
            self.weights.discard(key)

    def carry(self, tensor, device):
        """A copy to another device."""
        raw, source = (tensor.raw, tensor.device) if isinstance(tensor, Played) else (tensor, CPU)
        if source == device:
            return tensor
        self.copies.append((source, device, raw.numel() * raw.element_size()))
        copy = raw.detach().clone()
        sender = self.current(source) if source != CPU else None
        if sender:
            self.reads(tensor, sender)
        if device == CPU:
            return copy
        played, receiver = Played(copy, device, self), self.current(device)
        if sender:
            self.wait(sender, receiver)
        self.writes(played, sender or receiver, allocated=receiver)
        if sender:
            self.wait(receiver, sender)
        return played

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            tensor, *rest = args
            target = next(
                (torch.device(a) for a in rest if isinstance(a, (str, torch.device))), kwargs.pop("device", None)
            )
            if target is not None:
                tensor = self.carry(tensor, torch.device(target))
                rest = [a for a in rest if a is not None and not isinstance(a, (str, torch.device, bool))]
            return func(tensor, *rest, **kwargs)
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul) and args[0].dim() == 1 < args[1].dim():
            # PyTorch changes the shape of its own result, of which no wrapper would know.
            return (args[0][None] @ args[1])[0]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return self.carry(func(*args, **kwargs | {"device": CPU}), torch.device(device))
        return func(*args, **kwargs)


class Played(torch.Tensor):
    """A tensor on a played GPU; ``raw`` holds its numbers."""

    @staticmethod
    def __new__(cls, raw, gpu, gpus):
        played = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, requires_grad=False
        )
        played.raw, played.gpu, played.gpus = raw, gpu, gpus
        return played

    @property
    def device(self):
        return self.gpu

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        played = [x for x in given if isinstance(x, Played)]
        devices = {x.device for x in given if x.dim()} - ({CPU} if func is torch.ops.aten.copy_.default else set())
        assert len(devices) < 2, f"{func} of tensors on several devices"
        gpu, gpus = played[0].gpu, played[0].gpus
        result = func(
            *tree_map_only(Played, lambda x: x.raw, args), **tree_map_only(Played, lambda x: x.raw, kwargs or {})
        )
        # Those stay for as long as their module.
        gpus.weights |= {address(x) for x in played if isinstance(x, torch.nn.Parameter)}
        known = {id(x.raw): x for x in played}
        outputs = tree_map(
            lambda y: known.get(id(y), Played(y, gpu, gpus)) if isinstance(y, torch.Tensor) else y, result
        )
        if not func.is_view:
            stream, shared = gpus.current(gpu), {address(x) for x in played}
            gpus.ran.append(stream)
            for x in played:
                gpus.reads(x, stream)
            for y in tree_leaves(outputs):
                if isinstance(y, Played):
                    gpus.writes(y, stream, allocated=None if address(y) in shared else stream)
        return outputs


def address(tensor):
    """What tensors in the same memory share."""
    return tensor.raw.untyped_storage()._cdata
