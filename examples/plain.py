"""Plain PyTorch: choose half of the channels, train them to zero, take them out, go on training."""

import torch
from torch.nn.functional import cross_entropy

import masksparsity as ms
from masksparsity.data import DataConfig, create

torch.manual_seed(0)
data = create(DataConfig(name="digits"), batch_size=128, device=torch.device("cpu"), seed=0)
model = ms.models.create("resnet20", in_channels=1, width=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
images = next(data.test.epoch())[0]


def train(epochs: int) -> None:
    model.train()
    for epoch in range(epochs):
        for x, y in data.training().epoch(epoch):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()


train(epochs=2)
graph = ms.trace(model, images[:1])  # print(graph) shows what is coupled with what
keep = ms.select.uniform(graph, ms.scores.scale(model, graph), 0.5)
penalty = ms.ScheduledDecay(model, graph, keep, steps=2 * len(data.training()))
penalty.attach(optimizer)  # the line that a training loop gains
train(epochs=2)
penalty.detach()

before = model.eval()(images)
model = ms.prune(model, graph, keep, optimizer=optimizer)  # smaller, and its optimizer with it
torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
print(keep)
train(epochs=1)
ms.save(model, "slim.safetensors")
torch.testing.assert_close(ms.load("slim.safetensors")(images), model.eval()(images))
