"""What a fresh installation of the core must do: `python smoke.py`, in a folder that it may write to."""

import timm
import torch

import tokenpool

model = timm.create_model("deit_digits_patch2_16").eval()
images = torch.randn(2, 1, 16, 16)
plain = model(images)
tokenpool.patch(model, "wkmedoids", 0.7)
count = tokenpool.flops.count(model)
assert count.gmacs > count.clustering_gmacs > 0, count
trace = tokenpool.trace(model, images)
assert [block.tokens for block in trace.blocks] == list(tokenpool.hosts.of(model).setting.keep), trace.blocks
tokenpool.save(model, "model.safetensors")
assert torch.equal(tokenpool.load("model.safetensors").eval()(images), model(images))
assert torch.equal(tokenpool.unpatch(model)(images), plain)
print(f"tokenpool {tokenpool.__version__} works: {tokenpool.__file__}")
