"""timm: its model, optimizer and schedule; half of the MACs go."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import cross_entropy

import masksparsity as ms
from masksparsity.data import DataConfig, create

EPOCHS = 2
torch.manual_seed(0)
data = create(DataConfig(name="digits"), batch_size=128, device=torch.device("cpu"), seed=0)
images = next(data.test.epoch())[0]
model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS)

graph = ms.trace(model, images[:1])
scores = ms.scores.norm(model, graph)
keep = ms.select.budget(graph, scores, pruned_macs=0.5, round_to=8)
ms.ScheduledDecay(model, graph, keep, steps=EPOCHS * len(data.training())).attach(optimizer)

for epoch in range(EPOCHS):
    for x, y in data.training().epoch(epoch):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    scheduler.step(epoch + 1)

slim = ms.prune(model, graph, keep, optimizer=optimizer).eval()
torch.testing.assert_close(slim(images), model.eval()(images), rtol=1e-4, atol=1e-4)
