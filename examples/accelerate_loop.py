"""ferkd under Hugging Face Accelerate: several processes, mixed precision and gradient clipping are its business.

    accelerate launch examples/accelerate_loop.py --data photos --labels labels

The loader shares a step out itself, so it is not given to accelerator.prepare. A mean divides by the mass of the labels, which differs
between processes: their average would weigh them alike, so the mass of all is what each divides by.
"""

import argparse

import timm
import torch
from accelerate import Accelerator

from ferkd import CropLoader, RegionPolicy, ferkd_loss
from ferkd.loss import label_mass

parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True)
parser.add_argument("--labels", required=True)
parser.add_argument("--student", default="resnet18")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batch-size", type=int, default=256, help="crops a step, over all processes")
parser.add_argument("--epochs", type=float, default=100.0)
parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
parser.add_argument("--out", default="student")
args = parser.parse_args()

accelerator = Accelerator(mixed_precision=args.mixed_precision)
device, world = accelerator.device, accelerator.num_processes
policy = RegionPolicy(discard_below=0.1, calibrate_below=0.3)
loader = CropLoader(args.data, args.labels, size=args.size, batch_size=args.batch_size, epochs=args.epochs, policy=policy,
                    rank=accelerator.process_index, world_size=world)  # fmt: skip
student = timm.create_model(args.student, num_classes=loader.store.classes)
optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
student, optimizer = accelerator.prepare(student, optimizer)

for step, batch in enumerate(loader):
    images = batch.pixels.to(device, non_blocking=True).float() / 127.5 - 1.0
    labels, target = loader.records(batch, device), batch.target.to(device, non_blocking=True)
    mass = label_mass(labels, target, classes=loader.store.classes, policy=policy).sum()
    loss = ferkd_loss(student(images), labels, target, policy=policy, normalizer=accelerator.reduce(mass) / world)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(student.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == len(loader) - 1:
        accelerator.print(f"step {step + 1}/{len(loader)}  loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}")
accelerator.wait_for_everyone()
accelerator.save_model(student, args.out)
