
// Every section has its own threshold, which moves from score to score: what is above it is marked and counted,
// of the held-out pictures, too.
for (const section of document.querySelectorAll("section")) {
  const [slider, told] = section.querySelectorAll("input, output");
  const cards = [...section.querySelectorAll("figure")];
  const [limits, heldOut] = [section.dataset.limits, section.dataset.heldOut].map(JSON.parse);
  slider.oninput = () => {
    const limit = limits[slider.valueAsNumber], above = (score) => Number(score) > limit;
    for (const card of cards) card.classList.toggle("anomalous", above(card.dataset.score));
    told.textContent = `${limit.toPrecision(4)}: ` +
      `${cards.filter((card) => above(card.dataset.score)).length} of ${cards.length} pictures anomalous` +
      (heldOut.length ? `, ${heldOut.filter(above).length} of ${heldOut.length} held-out normal ones` : "");
  };
  slider.oninput();
}
