#!/usr/bin/env bash
# pytorch-lightning 2.6.6 with torchdata 0.11.0: a checkpoint saved within an epoch's last batch loses the next epoch.
# Saved in on_train_batch_end of the last batch (ModelCheckpoint(every_n_train_steps=...) may do so), a run resumed from it
# goes on with epoch 2, not 1, whatever the sampler: the loader's restored iterator is at the end of epoch 0, and epoch 1
# is run on it. Saved at the end of the epoch, or within it, nothing is lost. Prints the epochs the resumed run trains: {2}.
#
# Exit code: 0 as described, 1 otherwise. Installs both, if they are others, in a folder that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import pytorch_lightning as p, importlib.metadata as m; assert p.__version__ == "2.6.6" and m.version("torchdata") == "0.11.0"' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" pytorch-lightning==2.6.6 torchdata==0.11.0 torch==2.13.0
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON'
import contextlib
import tempfile

import pytorch_lightning as pl
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

STEPS = 10


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.epochs = set()

    def training_step(self, batch, step):
        self.epochs.add(self.trainer.current_epoch)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAndStop(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == STEPS:
            trainer.save_checkpoint(self.path)
            raise KeyError("stopped")


def train(callbacks, path=None):
    module, loader = Module(), StatefulDataLoader(torch.arange(2.0 * STEPS), batch_size=2, shuffle=True)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    with contextlib.suppress(KeyError):
        pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=callbacks, **quiet).fit(module, loader, ckpt_path=path)
    return module.epochs


with tempfile.TemporaryDirectory() as folder:
    train([SaveAndStop(f"{folder}/stopped.ckpt")])
    trained = train([], f"{folder}/stopped.ckpt")
print("pytorch-lightning", pl.__version__, "resumed: trains epochs", trained)
raise SystemExit(trained != {2})
PYTHON
