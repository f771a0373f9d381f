"use strict";

// The value of the token under the mouse, at once; without scripts the browser shows it after a while.
const tip = document.getElementById("tip");
let shown = null;

function leave() {
  if (shown) shown.title = tip.textContent;
  shown = null;
  tip.hidden = true;
}

document.addEventListener("mouseover", (event) => {
  const token = event.target instanceof Element ? event.target.closest(".text span[title]") : null;
  if (token === shown) return;
  leave();
  if (!token) return;
  shown = token;
  tip.textContent = token.title;
  token.removeAttribute("title");
  const box = token.getBoundingClientRect();
  tip.hidden = false;
  tip.style.left = `${Math.max(0, Math.min(box.left, window.innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.top > tip.offsetHeight + 4 ? box.top - tip.offsetHeight - 2 : box.bottom + 2}px`;
});
document.addEventListener("mouseout", (event) => {
  if (event.target === shown) leave();
});
document.addEventListener("scroll", leave, { passive: true });

// Arrow keys go to the previous and the next neuron or page.
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.target instanceof Element && event.target.closest("input, select, textarea, .quantiles")) return;
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = rel && document.querySelector(`a[rel=${rel}]`);
  if (link) link.click();
});

// The sequences that are shown as a whole are part of the address, so that a link names this very view.
const boxes = [...document.querySelectorAll(".exemplar[id] .more input")];
const link = document.getElementById("link");

function address() {
  const url = new URL(location.href);
  const whole = boxes.filter((box) => box.checked).map((box) => box.closest(".exemplar").id);
  if (whole.length) url.searchParams.set("whole", whole.join("."));
  else url.searchParams.delete("whole");
  return url.href;
}

if (link) {
  const whole = (new URL(location.href).searchParams.get("whole") || "").split(".");
  for (const box of boxes) {
    box.checked = whole.includes(box.closest(".exemplar").id);
    box.addEventListener("change", () => {
      history.replaceState(null, "", address());
      link.href = address();
    });
  }
  link.href = address();
  window.addEventListener("hashchange", () => { link.href = address(); });
}
