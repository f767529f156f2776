// Find: what happened to one recipient or message. The second question after "is it done".
import { get, query } from '../lib/api.js';
import { say } from '../lib/dialog.js';
import { clock, count, num, plain } from '../lib/format.js';
import { html, useEffect, useRef, useState } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { now } from '../lib/store.js';
import { Foreign, Icon, Quoted, State, Trouble, signOf, toneOf } from '../lib/ui.js';

const isId = (text) => /^msg_[0-9a-f]{32}_\d+$/.test(text);
const IDLE = { items: [], next: null, batches: 0, error: null, isBusy: false, isDone: false };

// A search reads every payload and comes in steps; each says how far it is.
function useSearch(text, by) {
  const [found, setFound] = useState(IDLE);
  const current = useRef(null);
  const stop = () => current.current?.abort();
  const step = async (cursor, before) => {
    stop();
    const mine = new AbortController();
    current.current = mine;
    let state = { ...before, isBusy: true, error: null };
    setFound(state);
    try {
      do {
        const page = await get(`/messages${query({ [by]: text, limit: 100, cursor })}`, mine.signal);
        cursor = page.next;
        state = { ...state, items: [...state.items, ...page.items], batches: state.batches + (page.searched?.batches ?? 0), next: page.next };
        setFound(state);
      } while (cursor && state.items.length - before.items.length < 100);
      setFound({ ...state, isBusy: false, isDone: true });
    } catch (error) {
      if (error.name !== 'AbortError') setFound({ ...state, isBusy: false, isDone: true, error: error.status === 404 ? null : error });
      else setFound((old) => ({ ...old, isBusy: false }));
    }
  };
  useEffect(() => { if (text) step(null, IDLE); else setFound(IDLE); return stop; }, [text, by]);
  return { ...found, stop, more: () => step(found.next, found) };
}

// Times as they are kept, to be handed on.
function proof(story) {
  const lines = [`${story.id}  row ${story.row} of ${plain(story.file_name)}`];
  if (story.state === 'rejected') lines.push(`rejected: line ${story.line}: ${plain(story.reason)}`);
  else if (story.state === 'duplicate') lines.push('duplicate: a row before it has the same recipient');
  else {
    lines.push(`${story.state}, to ${plain(story.recipient ?? '(payload archived)')} at ${plain(story.destination)}`, `${story.accepted_at}  accepted`);
    for (const attempt of story.attempts) lines.push(`${attempt.at}  failed: ${attempt.status ?? attempt.reason}`);
    if (story.sent) lines.push(`${story.sent.at}  sent: ${story.sent.status}`);
    if (story.receipt) lines.push(`${story.receipt.at ?? 'at an unknown time'}  receipt: ${story.receipt.state} ${plain(story.receipt.status)} ${plain(story.receipt.response)}`.trim());
    if (story.cause) lines.push(`given up: ${story.cause}`);
  }
  return lines.join('\n');
}
async function copy(story) {
  try {
    await navigator.clipboard.writeText(proof(story));
    say('Copied as text, with times, statuses and ids.');
  } catch {
    say('This browser lets no page copy without https; select the text instead.');
  }
}

const Line = ({ sign, tone, title, at, children }) => html`<li><${Icon} name=${sign} tone=${tone} /><b>${title}</b> <span class="mono" title=${at}>${at ? clock(at, now()) : ''}</span>${children && html`<p>${children}</p>`}</li>`;

function Story({ story }) {
  const head = html`<div class="sh"><h2><${State} is=${story.state} /></h2><span class="dim">row ${num(story.row)} of <a href=${to('files', story.file)}><${Foreign} text=${story.file_name} /></a>${story.destination && html`, to <a href=${to('destinations', story.destination)}>${plain(story.destination)}</a>`}</span><button class="btn sm r" onClick=${() => copy(story)}>Copy as proof</button></div><p class="mono dim small">${story.id}</p>`;
  if (story.state === 'rejected') return html`<section aria-label="Message">${head}<p class="none">Line ${num(story.line)}: <${Foreign} text=${story.reason} /></p></section>`;
  if (story.state === 'duplicate') return html`<section aria-label="Message">${head}<p class="none">A row before it has the same recipient.</p></section>`;
  return html`<section aria-label="Message">${head}<p>to <b>${story.recipient == null ? '(payload archived)' : html`<${Foreign} text=${story.recipient} />`}</b></p>
    <ol class="ev"><${Line} sign="pending" title=${story.redriven ? `Accepted, redriven ${story.redriven === 1 ? 'once' : `${story.redriven} times`}` : 'Accepted'} at=${story.accepted_at} />
      ${story.rendered_anew_at && html`<${Line} sign="retry" title="Its body was made anew" at=${story.rendered_anew_at} />`}
      ${story.attempts.map((attempt, i) => html`<${Line} sign="dead" tone="dead" title=${`Attempt ${i + 1}: ${attempt.status ?? attempt.reason}`} at=${attempt.at}>${i === story.attempts.length - 1 && story.detail && html`<${Quoted} text=${story.detail} />`}<//>`)}
      ${story.sent && html`<${Line} sign="sent" tone="sent" title=${`Sent: ${story.sent.status}`} at=${story.sent.at}>${story.provider_id && html`provider id <${Foreign} text=${story.provider_id} mono />`}<//>`}
      ${story.cause && html`<${Line} sign="dead" tone="dead" title=${`Given up: ${story.cause}`} />`}
      ${story.receipt && html`<${Line} sign=${signOf(story.receipt.state)} tone=${toneOf(story.receipt.state)} title=${`Receipt: ${story.receipt.state}`} at=${story.receipt.at}>${[story.receipt.status, story.receipt.carrier, story.receipt.response].filter(Boolean).map((text) => html`<${Foreign} text=${text} /> `)}<//>`}
      ${story.conflict && html`<${Line} sign="warn" tone="retry" title="Receipts say that it failed and that it arrived" />`}
      ${story.next_attempt && html`<${Line} sign="clock" title="Next attempt not before" at=${story.next_attempt} />`}</ol></section>`;
}

export function Find({ values }) {
  const asked = values.id ?? values.q ?? '';
  const [typed, setTyped] = useState(asked);
  const field = useRef();
  useEffect(() => { setTyped(asked); field.current?.focus({ preventScroll: true }); }, [asked]);
  const search = useSearch(asked, isId(asked) ? 'id' : 'recipient');
  const go = (event) => { event.preventDefault(); location.hash = to('find', null, { q: typed.trim() }); };
  const { items, batches, isBusy, isDone, next, error } = search;
  return html`<section aria-label="Find"><h1>What happened to…</h1>
    <form class="search" onSubmit=${go} role="search"><label class="vh" for="find">Recipient or message id</label><input id="find" ref=${field} type="text" value=${typed} placeholder="a recipient, or msg_…" autocomplete="off" spellcheck=${false} onInput=${(event) => setTyped(event.target.value)} />
      ${isBusy ? html`<button type="button" class="btn" onClick=${search.stop}>Stop</button>` : html`<button class="btn pri" disabled=${!typed.trim()}>Find</button>`}</form>
    <p class="because flat" role="status">${!asked ? 'A search by recipient reads every payload that isn’t archived; one by id costs a few reads.' : isBusy ? `Searching: ${count(batches, 'batch', 'batches')} read, ${num(items.length)} found…` : isDone && !error ? (items.length ? `${count(items.length, 'message')} found${next ? ' so far' : ''}.` : html`Nothing is found for <q><${Foreign} text=${asked} /></q>. Rows that are not read yet, and files that were never dropped, are not known; archived messages are found by id only.`) : ''}</p>
    <${Trouble} error=${error} /></section>
    ${items.map((story) => html`<${Story} story=${story} key=${`${story.id} ${story.destination}`} />`)}
    ${next && !isBusy && html`<div class="foot"><span>The search isn’t through.</span><button class="btn sm r" onClick=${search.more}>Go on</button></div>`}`;
}
