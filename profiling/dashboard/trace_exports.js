// Offers a trace as a file, and opens it in ui.perfetto.dev, which runs in the visitor's browser: the trace goes from this page to
// that one by a message, and to no server. Only on a click; until then nothing is fetched from there.
// value: {url, file, run, title}: where the trace lies, what it is called as a file and as a run of TensorBoard's; or nothing.
const PERFETTO = 'https://ui.perfetto.dev';
const button = element.querySelector('[data-open]');
const words = element.querySelector('[data-words]');
const PATIENCE_MS = 30000;
const say = (text) => { words.textContent = text; };
const ready = () => {
  const value = props.value || {};
  button.disabled = !value.url;
  for (const [link, name] of [[element.querySelector('[data-file]'), value.file], [element.querySelector('[data-run]'), value.run]]) {
    link.toggleAttribute('aria-disabled', !value.url);
    if (value.url) {
      link.href = new URL(value.url, document.baseURI).href;
      link.download = name;
    } else {
      link.removeAttribute('href');
    }
  }
  say('');
};
// Perfetto answers PONG to a PING once it listens.
const listening = (opened) => new Promise((resolve, reject) => {
  const ping = setInterval(() => opened.postMessage('PING', PERFETTO), 100);
  const end = (settle, value) => {
    clearInterval(ping);
    clearTimeout(patience);
    window.removeEventListener('message', answer);
    settle(value);
  };
  const answer = (event) => {
    if (event.source === opened && event.data === 'PONG') end(resolve);
  };
  const patience = setTimeout(() => end(reject, new Error('ui.perfetto.dev does not answer')), PATIENCE_MS);
  window.addEventListener('message', answer);
});
button.addEventListener('click', async () => {
  const opened = window.open(PERFETTO);  // at once: a browser lets only a click open a window
  if (!opened) {
    say('The browser opened no window: allow it, or download the trace and drop it on ui.perfetto.dev.');
    return;
  }
  say('opening');
  try {
    const [response] = await Promise.all([fetch(new URL(props.value.url, document.baseURI)), listening(opened)]);
    if (!response.ok) throw new Error('the trace is no longer on the server');
    const buffer = await response.arrayBuffer();
    opened.postMessage({ perfetto: { buffer, title: props.value.title, fileName: props.value.file } }, PERFETTO);
    say('');
  } catch (error) {
    say(`It could not be opened: ${error.message}. Download the trace and drop it on ui.perfetto.dev.`);
  }
});
ready();
watch('value', ready);
