"""Lightning (pip install lightning): the penalty goes where the optimizer is made."""

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import masksparsity as ms
from masksparsity.data import DataConfig, create


class Classifier(lightning.LightningModule):
    def __init__(self, example: Tensor, steps: int):
        super().__init__()
        self.model = ms.models.create("resnet20", in_channels=1, width=8)
        self.steps, self.graph = steps, ms.trace(self.model, example)
        self.keep = ms.select.uniform(self.graph, ms.scores.norm(self.model, self.graph), 0.5)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        ms.ScheduledDecay(self.model, self.graph, self.keep, self.steps).attach(optimizer)
        return optimizer


lightning.seed_everything(0, verbose=False)
data = create(DataConfig(name="digits"), batch_size=128, device=torch.device("cpu"), seed=0)
images, labels = map(torch.cat, zip(*data.training().epoch(), strict=True))
loader = DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True)
module = Classifier(images[:1], steps=2 * len(loader))
lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
    module, loader
)
slim = ms.prune(module.model, module.graph, module.keep).eval()
torch.testing.assert_close(slim(images), module.model.eval()(images), rtol=1e-4, atol=1e-4)
