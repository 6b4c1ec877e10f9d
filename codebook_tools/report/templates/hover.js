{
  const figure = document.currentScript.closest("figure");
  const plot = figure.querySelector(".hovered svg");
  const tip = figure.querySelector(".tip");
  const [tile, label] = tip.children;
  const { places, labels, columns } = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const rows = Math.ceil(places.length / columns);
  tile.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    let nearest = -1;
    let least = 12 ** 2; // pixels
    places.forEach(([x, y], i) => {
      const away = (event.clientX - box.left - x * box.width) ** 2 + (event.clientY - box.top - y * box.height) ** 2;
      if (away < least) [nearest, least] = [i, away];
    });
    tip.hidden = nearest < 0;
    if (tip.hidden) return;
    const share = (at, all) => (all > 1 ? (100 * at) / (all - 1) : 0);
    tile.style.backgroundPosition =
      `${share(nearest % columns, columns)}% ${share(Math.floor(nearest / columns), rows)}%`;
    label.textContent = labels[nearest];
    tip.style.left = `${Math.min(event.clientX + 16, innerWidth - tip.offsetWidth)}px`;
    tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight)}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show); // a finger that taps does not move
  plot.addEventListener("pointerleave", (event) => {
    tip.hidden ||= event.pointerType === "mouse"; // a finger leaves when it is lifted
  });
}
