// Draws each figure from the JSON next to it, and redraws it when the theme or the width changes.
(() => {
  const NARROW = 600;  // pixels
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")].map((element) => ({
    element, text: element.closest("figure").querySelector("script").textContent, drawn: "",
  }));

  function themed(text) {
    if (!dark.matches) return JSON.parse(text);
    return JSON.parse(text.replace(/"(#[0-9a-f]{6}|rgba?\([\d,.]+\)|white)"/g, (quoted, colour) =>
      JSON.stringify(DARK_COLOURS[colour] ?? colour)));
  }

  // Stacks panels that are side by side.
  function stack(layout) {
    const axes = Object.keys(layout).filter((key) => /^xaxis\d*$/.test(key));
    if (axes.length < 2) return;
    axes.sort((a, b) => layout[a].domain[0] - layout[b].domain[0]);
    layout.height *= axes.length;
    axes.forEach((name, k) => {
      const y = layout["yaxis" + name.slice(5)], part = 1 / axes.length;
      layout[name].domain = [0, 1];
      y.domain = [1 - (k + 1) * part + 0.28 * part, 1 - k * part];
      y.showticklabels = true;
      const title = (layout.annotations ?? [])[k];
      if (title) Object.assign(title, { x: 0.5, y: y.domain[1] });
    });
  }

  // Moves the legend below the plot and hides the buttons, which would cover it.
  function narrow(spec) {
    const layout = spec.layout;
    stack(layout);
    const named = spec.data.filter((trace) => trace.showlegend !== false && trace.name && trace.type !== "heatmap");
    const lines = layout.showlegend === false ? 0 : named.reduce((sum, trace) => sum + trace.name.split("<br>").length, 0);
    const room = lines > 1 || named.length > 1 ? 20 * lines + 10 : 0;
    layout.legend = { ...layout.legend, orientation: "v", x: 0, xanchor: "left", xref: "paper", y: 0, yanchor: "bottom", yref: "container" };
    layout.margin = { ...layout.margin, l: 10, t: 40, b: 60 + room };
    layout.height += room;
    layout.font = { ...layout.font, size: 12 };
    for (const trace of spec.data) {
      if (trace.colorbar) trace.colorbar.thickness = 8;
    }
    spec.config.displayModeBar = false;
  }

  function draw(plot) {
    const isNarrow = plot.element.clientWidth < NARROW, state = `${dark.matches} ${isNarrow}`;
    if (plot.drawn === state) return;
    plot.drawn = state;
    const spec = themed(plot.text);
    if (isNarrow) narrow(spec);
    plot.element.style.height = spec.layout.height + "px";
    Plotly.newPlot(plot.element, spec.data, spec.layout, spec.config);
  }

  const drawAll = () => plots.forEach(draw);
  dark.addEventListener("change", drawAll);
  window.addEventListener("resize", drawAll);
  drawAll();
})();
