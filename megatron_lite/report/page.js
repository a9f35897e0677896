// Reads values out of the charts: under the pointer, at the step of the slider, in all charts at once.
"use strict";
(() => {
  const root = document.documentElement;
  addEventListener("error", (event) => { root.dataset.error = event.message; });
  const curves = JSON.parse(document.getElementById("curves").textContent);
  const slider = document.querySelector("#reader input");
  const shownStep = document.querySelector("#reader output");

  const label = (value) => {
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e9)) return value.toExponential(3);
    const digits = size >= 1e4 ? 0 : Math.max(0, 4 - Math.floor(Math.log10(size || 1)) - 1);
    return value.toLocaleString("en", { maximumFractionDigits: digits });
  };

  // The position in xs, which ascend, of the value that is nearest to x.
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] <= xs[high] - x ? low : high;
  };

  const share = (scale, value) => scale.log
    ? Math.log(value / scale.low) / Math.log(scale.high / scale.low)
    : (value - scale.low) / (scale.high - scale.low);

  const add = (parent, className) => {
    const element = document.createElement("div");
    element.className = className;
    parent.append(element);
    return element;
  };

  const panels = [...document.querySelectorAll("figure")].map((figure, index) => {
    const plots = figure.querySelector(".plots");
    const values = [...figure.querySelectorAll(".legend output")];
    const data = curves.panels[index];
    return {
      figure, plots, data, values,
      last: values.map((value) => value.textContent),
      cursor: add(plots, "cursor"),
      dots: data.series.map((series) => add(plots, `reading k${series.colour}`)),
    };
  });

  const across = (step) => (step - curves.first) / (curves.last - curves.first || 1);

  const steps = curves.panels.flatMap((panel) => panel.series.map((series) => series.x))
    .reduce((longest, xs) => (xs.length > longest.length ? xs : longest), [curves.last]);

  const show = (wanted) => {
    const step = steps[nearest(steps, wanted)];
    for (const panel of panels) {
      const toLog = panel.figure.querySelector(".to-log");
      const scale = panel.data.scales[toLog && toLog.checked ? 1 : 0];
      panel.cursor.style.left = `${100 * across(step)}%`;
      panel.data.series.forEach((series, i) => {
        const at = nearest(series.x, step), y = share(scale, series.y[at]);
        panel.values[i].textContent = label(series.y[at]);
        const dot = panel.dots[i].style;
        dot.left = `${100 * across(series.x[at])}%`;
        dot.top = `${100 * (1 - y)}%`;
        dot.visibility = y >= 0 && y <= 1 ? "" : "hidden";
      });
    }
    slider.value = step;
    shownStep.textContent = step.toLocaleString("en");
    root.classList.add("reads");
  };

  const clear = () => {
    root.classList.remove("reads");
    for (const panel of panels) panel.values.forEach((value, i) => { value.textContent = panel.last[i]; });
    slider.value = curves.last;
    shownStep.textContent = curves.last.toLocaleString("en");
  };

  for (const { plots, figure } of panels) {
    plots.addEventListener("pointermove", (event) => {
      const box = plots.getBoundingClientRect();
      const way = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      show(curves.first + way * (curves.last - curves.first));
    });
    plots.addEventListener("pointerleave", clear);
    figure.addEventListener("change", () => { if (root.classList.contains("reads")) show(Number(slider.value)); });
  }
  slider.addEventListener("input", () => show(Number(slider.value)));
  slider.addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });
  clear();
  root.classList.add("scripted");
})();
