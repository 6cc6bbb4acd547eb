// Photographs with crops in the colours of their regions, under a policy that may change.

// As the sampler and the loss decide it: in float32, and discarding wins.
function regionOf(crop, policy) {
  const confidence = Math.fround(crop[policy.confidence]);
  const [below, calibrate, above] = [policy.discard_below, policy.calibrate_below, policy.discard_above].map(Math.fround);
  if (confidence < below || confidence > above) return "discarded";
  return confidence < calibrate ? "calibrated" : "kept";
}

// Fills `host`; returns a function that takes a policy and colours everything by it.
function photoGallery(host, photos) {
  const parts = []; // [crop, its box on the photograph, its cut-out, its words]
  for (const photo of photos) {
    const card = host.appendChild(make("figure", { class: "photo" }));
    card.append(make("figcaption", {}, make("b", {}, photo.truth), make("small", {}, ` ${photo.path}`)));
    const { width, height } = photo;
    const label = `${photo.truth} with its crops`;
    const svg = draw(card, "svg", { class: "picture", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    draw(svg, "image", { href: photo.jpeg, width, height, preserveAspectRatio: "none" });
    const list = card.appendChild(make("div", { class: "crops" }));
    for (const crop of photo.crops) {
      const [left, top, w, h] = crop.box;
      const box = draw(svg, "rect", { x: left, y: top, width: w, height: h, "vector-effect": "non-scaling-stroke" });
      const words = make("span", { class: "words" });
      const button = list.appendChild(make("button", { type: "button" }));
      const cut = draw(button, "svg", { viewBox: `${left} ${top} ${w} ${h}`, preserveAspectRatio: "none", "aria-hidden": "true" });
      const mirror = crop.flip ? `translate(${2 * left + w} 0) scale(-1 1)` : "";
      draw(cut, "image", { href: photo.jpeg, width, height, preserveAspectRatio: "none", transform: mirror });
      button.append(make("span", { class: crop.agrees ? "right" : "wrong" }, `${crop.answer} ${percent(crop.probability, 0)}`), words);
      parts.push({ crop, box, button, words });
      const mark = (on) => () => [box, button].forEach((part) => part.classList.toggle("marked", on));
      for (const kind of ["pointerenter", "focus"]) button.addEventListener(kind, mark(true));
      for (const kind of ["pointerleave", "blur"]) button.addEventListener(kind, mark(false));
    }
  }
  return (policy) => {
    for (const { crop, box, button, words } of parts) {
      const region = regionOf(crop, policy);
      for (const part of [box, button]) {
        part.classList.remove("discarded", "calibrated", "kept");
        part.classList.add(region);
      }
      words.textContent = policy.confidence === "max" ? region : `${region} (truth ${percent(crop.target, 0)})`;
    }
  };
}
