"""Accelerate (pip install accelerate): trace the bare model, prune the prepared one."""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import masksparsity as ms
from masksparsity.data import DataConfig, create

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
data = create(DataConfig(name="digits"), batch_size=128, device=accelerator.device, seed=0)
images, labels = map(torch.cat, zip(*data.training().epoch(), strict=True))
loader = DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True)

model = ms.models.create("resnet20", in_channels=1, width=8)
graph = ms.trace(model, images[:1])
keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
ms.ScheduledDecay(model, graph, keep, steps=2 * len(loader)).attach(optimizer)

for _ in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()

slim = ms.prune(model, graph, keep, optimizer=optimizer).eval()  # bare: prepare it to go on
torch.testing.assert_close(slim(images), model.eval()(images), rtol=1e-4, atol=1e-4)
