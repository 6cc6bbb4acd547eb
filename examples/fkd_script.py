"""FKD's ImageNet script with ferkd instead of its dataset, its collate function and its loss; its arguments keep their names.

    python examples/fkd_script.py --softlabel_path labels --num_crops 4 -b 1024 --epochs 300 photos

What was a dataset and a decoder of soft labels is a CropLoader: `labels` is a store of `ferkd label`, or FKD's own files through
`ferkd convert fkd`. What was a cross-entropy on a dense [B, C] target is ferkd_loss on the stored bytes. Epochs are counted in crops, the
last num_crops of them take one crop an image, and the learning rate follows the passes, all as in FKD.
"""

import argparse
import math

import torch
import torchvision

from ferkd import CropLoader, RegionPolicy, ferkd_loss

parser = argparse.ArgumentParser()
parser.add_argument("data", help="folder with train/CLASS/*")
parser.add_argument("-a", "--arch", default="resnet50")
parser.add_argument("-b", "--batch-size", type=int, default=1024, help="crops a step")
parser.add_argument("--softlabel_path", required=True)
parser.add_argument("--num_crops", type=int, default=4)
parser.add_argument("--epochs", type=int, default=300)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--discard-below", type=float, default=0.0, help="with thresholds it is FerKD")
parser.add_argument("--calibrate-below", type=float, default=0.0)
parser.add_argument("--save", default="checkpoint.pth")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
policy = RegionPolicy(discard_below=args.discard_below, calibrate_below=args.calibrate_below)
loader = CropLoader(args.data, args.softlabel_path, size=args.size, batch_size=args.batch_size, epochs=args.epochs,
                    crops_per_image=args.num_crops, single_crop_epochs=args.num_crops, policy=policy)  # fmt: skip
model = torchvision.models.get_model(args.arch, num_classes=loader.store.classes).to(device)
optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

for step, batch in enumerate(loader):
    epoch = int(step * loader.epochs_a_step)
    if epoch < args.epochs - args.num_crops:  # num_crops epochs in which every image is visited once; later an epoch is a pass
        epoch -= epoch % args.num_crops
    for group in optimizer.param_groups:
        group["lr"] = 0.5 * args.lr * (1 + math.cos(math.pi * epoch / args.epochs))
    images = (batch.pixels.to(device, non_blocking=True).float() / 255 - mean) / std
    loss = ferkd_loss(model(images), loader.records(batch, device), batch.target.to(device, non_blocking=True), policy=policy)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0 or step == len(loader) - 1:
        print(f"step {step + 1}/{len(loader)}  epoch {epoch}  lr {group['lr']:.4f}  loss {loss.item():.4f}")
torch.save({"arch": args.arch, "state_dict": model.state_dict()}, args.save)
