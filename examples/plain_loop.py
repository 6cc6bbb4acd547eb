"""ferkd's crops, labels and loss in a plain PyTorch loop.

python examples/plain_loop.py --data photos --labels labels --student resnet18
"""

import argparse

import timm
import torch

from ferkd import CropLoader, FerKDLoss, RegionPolicy

parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True, help="the folder that was labelled")
parser.add_argument("--labels", required=True, help="the label store")
parser.add_argument("--student", default="resnet18")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--epochs", type=float, default=100.0)
parser.add_argument("--out", default="student.pth")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
policy = RegionPolicy(discard_below=0.1, calibrate_below=0.3)  # look at your labels with `ferkd inspect` first
loader = CropLoader(args.data, args.labels, size=args.size, batch_size=args.batch_size, epochs=args.epochs, policy=policy)
student = timm.create_model(args.student, num_classes=loader.store.classes).to(device)
optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
criterion = FerKDLoss(policy)

for step, batch in enumerate(loader):
    images = batch.pixels.to(device, non_blocking=True).float() / 127.5 - 1.0
    loss = criterion(student(images), loader.records(batch, device), batch.target.to(device, non_blocking=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 50 == 0 or step == len(loader) - 1:
        print(f"step {step + 1}/{len(loader)}  loss {loss.item():.4f}")
torch.save(student.state_dict(), args.out)
