// Draws the figure in value.json on one node with Plotly.react, so that the visitor's zoom survives every update.
const host = element.querySelector('[data-plot]');
const caption = element.querySelector('[data-caption]');
// One copy of plotly.js for all live plots, under its own name: gr.Plot ships another version and overwrites window.Plotly.
window.floraPlotly ??= new Promise((resolve, reject) => {
  const script = document.createElement('script');
  script.src = new URL(host.dataset.plotly, document.baseURI).href;
  script.onload = () => resolve(window.Plotly);
  script.onerror = () => reject(new Error('plotly.js did not load'));
  document.head.appendChild(script);
});
const merge = (base, over) => {
  const merged = { ...base };
  for (const [key, value] of Object.entries(over || {})) {
    const nested = value && typeof value === 'object' && !Array.isArray(value);
    merged[key] = nested ? merge(merged[key], value) : value;
  }
  return merged;
};
const themed = (layout) => {
  const style = getComputedStyle(element);
  const ink = style.getPropertyValue('--instrument-ink').trim();
  const muted = style.getPropertyValue('--instrument-muted').trim();
  const grid = style.getPropertyValue('--instrument-grid').trim();
  const panel = style.getPropertyValue('--instrument-panel').trim();
  const axis = {
    gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickfont: { color: muted }, title: { font: { color: muted } },
  };
  const axes = Object.fromEntries(
    Object.keys(layout).concat('xaxis', 'yaxis').filter((key) => /^[xy]axis/.test(key)).map((key) => [key, axis]));
  return merge(layout, {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', autosize: true,
    font: { family: style.fontFamily, size: 11, color: ink },
    legend: { font: { color: ink } },
    hoverlabel: { bgcolor: panel, bordercolor: grid, font: { family: style.fontFamily, color: ink } },
    modebar: { color: muted, activecolor: ink, bgcolor: 'rgba(0,0,0,0)' },
    ...axes,
  });
};
// Plotly's own uirevision gives up the end of a zoomed axis that the figure moves, as a growing axis does: so the visitor's ranges
// are kept here, until a double click or a figure of another revision.
let zoom = { revision: null, ranges: {} };
const keepZoom = (change) => {
  for (const axis of ['xaxis', 'yaxis']) {
    const ends = change[`${axis}.range`] || [change[`${axis}.range[0]`], change[`${axis}.range[1]`]];
    if (ends[0] !== undefined && ends[1] !== undefined) zoom.ranges[axis] = [...ends];
  }
};
const forgetZoom = () => {
  zoom.ranges = {};
  draw();
};
const zoomed = (layout) => {
  if (zoom.revision !== layout.uirevision) zoom = { revision: layout.uirevision, ranges: {} };
  return merge(layout, Object.fromEntries(Object.entries(zoom.ranges).map(([axis, range]) => [axis, { range: [...range] }])));
};
// Before the first point the axes are but a guess, and a box drawn there would hide what comes.
const still = (data, layout) => {
  if (data.some((trace) => trace.x?.length !== 0)) return layout;
  return merge(layout, { xaxis: { fixedrange: true }, yaxis: { fixedrange: true } });
};
// Plotly's own button to share a chart would send its data to another host. Where no axis can be zoomed there is nothing to undo.
const config = (plotly, layout) => ({
  displaylogo: false, responsive: true, displayModeBar: 'hover', doubleClick: false, showSendToCloud: false,
  modeBarButtonsToRemove: ['lasso2d', 'select2d', 'autoScale2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d'],
  modeBarButtonsToAdd: layout.xaxis && layout.xaxis.fixedrange ? []
    : [{ name: 'whole', title: 'Show the whole run', icon: plotly.Icons.home, click: forgetZoom }],
});
let listening = false;
let dragging = false;
let known = { json: null, figure: null };
const given = () => {
  const json = props.value?.json ?? null;
  if (json !== known.json) known = { json, figure: json && JSON.parse(json) };
  return known.figure;
};
const draw = async () => {
  const figure = given();
  if (!figure || dragging) return;
  if (figure.summary && caption.textContent !== figure.summary) {
    caption.textContent = figure.summary;
    host.setAttribute('aria-label', figure.summary);
  }
  try {
    const plotly = await window.floraPlotly;
    if (figure !== given() || dragging) return;
    const { data, layout } = JSON.parse(known.json); // a copy: Plotly writes into what it is given
    await plotly.react(host, data, still(data, zoomed(themed(layout))), config(plotly, layout));
    if (!listening) {
      listening = true;
      host.on('plotly_relayout', keepZoom);
      host.on('plotly_doubleclick', forgetZoom);
    }
  } catch (error) {
    caption.textContent = `The chart could not be drawn (${error.message}). The downloads hold its data.`;
  }
};
// What the chart shows, as lines: the table that came with it, else its points.
const lines = () => {
  const figure = given();
  if (figure.table) return figure.table;
  const { data, layout } = figure;
  const title = (axis, fallback) => (axis && axis.title && (axis.title.text ?? axis.title)) || fallback;
  const found = [['series', title(layout.xaxis, 'x'), title(layout.yaxis, 'y')]];
  for (const trace of data) {
    (trace.x || []).forEach((x, i) => found.push([trace.name || '', x, trace.y[i]]));
  }
  return found;
};
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-download]')) saveCsv(lines(), host.dataset.file);
});
// A redraw would cut short the box that the visitor is drawing: wait until the button is up and Plotly has zoomed.
host.addEventListener('pointerdown', () => { dragging = true; }, true);
for (const end of ['pointerup', 'pointercancel']) {
  window.addEventListener(end, () => {
    if (!dragging) return;
    dragging = false;
    setTimeout(draw, 100);
  }, true);
}
new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ['class'] });
draw();
watch('value', draw);
