// Dialogs and the line at the foot. A confirmation says what will happen; its button repeats verb and number; focus begins
// on what changes nothing, and Esc always means no.
import { html, useEffect, useLayoutEffect, useRef, useState } from '../vendor/preact.js';
import { plain } from './format.js';
import { Icon } from './ui.js';

let show = () => {};
let toast = () => {};
export const openDialog = (content) => show(content);
export const closeDialog = () => show(null);
export const say = (text) => toast(text);
export const isOpen = () => Boolean(document.querySelector('dialog[open]'));

export function Dialogs() {
  const box = useRef();
  const [content, setContent] = useState(null);
  const [line, setLine] = useState('');
  show = setContent;
  toast = setLine;
  useLayoutEffect(() => {
    const dialog = box.current;
    if (content && !dialog.open) {
      dialog.showModal();
      dialog.querySelector('[data-first]')?.focus();
    }
    if (!content && dialog.open) dialog.close();
  }, [content]);
  useEffect(() => {
    if (!line) return undefined;
    const timer = setTimeout(() => setLine(''), 8_000);
    return () => clearTimeout(timer);
  }, [line]);
  return html`<dialog ref=${box} aria-labelledby="dialog-title" onClose=${() => setContent(null)} onClick=${(event) => event.target === box.current && setContent(null)}>${content}</dialog>
    <div class="toast" role="status">${line}</div>`;
}

const Point = ({ sign, tone, children }) => html`<li><${Icon} name=${sign} tone=${tone} /><span>${children}</span></li>`;

// `points`: `[sign, tone, words]`. `run(value, progress)` does it and gives the line that says so. `field`: `{label, value, ok}`.
export function Confirm({ title, lead, points = [], verb, bad, field, run }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState('');
  const [progress, setProgress] = useState('');
  const [value, setValue] = useState(field?.value ?? '');
  const isOk = !field || field.ok(value);
  const act = async (event) => {
    event.preventDefault();
    if (busy || !isOk) return;
    setBusy(true);
    setError('');
    try {
      say(await run(value, setProgress));
      closeDialog();
    } catch (failure) {
      setError(failure.message);
    }
    setBusy(false);
  };
  return html`<form onSubmit=${act}>
    <h2 id="dialog-title">${title}</h2>
    ${lead && html`<p>${lead}</p>`}
    <ul class="plan">${points.map(([sign, tone, words]) => html`<${Point} sign=${sign} tone=${tone}>${words}<//>`)}</ul>
    ${field && html`<label class="field">${field.label}<input type="text" autocomplete="off" spellcheck=${false} value=${value} onInput=${(event) => setValue(event.target.value)} inputmode=${field.mode} /></label>`}
    <p class="said" role="status">${error ? html`<${Icon} name="warn" tone="retry" /> ${plain(error)}` : progress}</p>
    <div class="acts">
      <button type="button" class="btn" data-first onClick=${closeDialog}>${busy ? 'Close' : 'Keep as it is'} <kbd>Esc</kbd></button>
      <button type="submit" class=${`btn pri ${bad ? 'bad' : ''}`} disabled=${busy || !isOk}>${busy ? 'Working…' : verb}</button>
    </div>
  </form>`;
}

const KEYS = [
  ['1 … 8', 'Now, Files, Dead letters, Destinations, Pipeline, Receipts, Alarms, Audit'], ['/', 'find a recipient or a message'], ['j k', 'down and up in a list'], ['Enter', 'open the row'],
  ['h', 'hold or release the file that is open'], ['p', 'pause or resume the destination that is open'], ['R', 'redrive all that match'], ['← →', 'move the line in a chart; with Shift a minute'],
  ['f', 'freeze the numbers, and go on'], ['t', 'dark or light'], ['?', 'this list'], ['Esc', 'close; in a confirmation it always means no'],
];
export const Help = () => html`<h2 id="dialog-title">Keys</h2>
  <dl class="keys">${KEYS.map(([keys, does]) => html`<dt>${keys.split(' ').map((key) => (key === '…' ? ' … ' : html`<kbd>${key}</kbd> `))}</dt><dd>${does}</dd>`)}</dl>
  <div class="acts"><button class="btn" data-first onClick=${closeDialog}>Close</button></div>`;
