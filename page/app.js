// The frame: rail, top line, the view that the address names, keys. Views are under views/, what they share under lib/.
import { Dialogs, Help, isOpen, openDialog } from './lib/dialog.js';
import { clock, duration, num, plain, seconds, zone } from './lib/format.js';
import { html, render, useEffect, useRef, useState } from './vendor/preact.js';
import { here, to, useRoute } from './lib/route.js';
import { enter, freeze, now, start, state, useLive } from './lib/store.js';
import { Icon } from './lib/ui.js';
import { Alarms } from './views/alarms.js';
import { Audit } from './views/audit.js';
import { Dead } from './views/dead.js';
import { Destination, Destinations } from './views/destinations.js';
import { File } from './views/file.js';
import { Files } from './views/files.js';
import { Find } from './views/find.js';
import { Now } from './views/now.js';
import { Pipeline } from './views/pipeline.js';
import { Receipts } from './views/receipts.js';

// Key, word, sign, how many. On a phone the first four and `More` are tabs.
const VIEWS = [
  ['now', 'Now', 'go'],
  ['files', 'Files', 'file', ({ files }) => files.reading + files.sending + files.held + files.waiting],
  ['dead', html`Dead<span class="wd"> letters</span>`, 'dead', ({ dead }) => dead],
  ['destinations', 'Destinations', 'closed', ({ daemon }) => daemon.destinations],
  ['pipeline', 'Pipeline', 'flow'],
  ['receipts', 'Receipts', 'receipt'],
  ['alarms', 'Alarms', 'bell', ({ alarms }) => alarms.length],
  ['audit', 'Audit', 'book'],
];
const TABS = 4;

function Viewed({ route }) {
  switch (route.view) {
    case 'files': return route.arg ? html`<${File} id=${route.arg} key=${route.arg} />` : html`<${Files} values=${route.values} />`;
    case 'dead': return html`<${Dead} values=${route.values} />`;
    case 'destinations': return route.arg ? html`<${Destination} name=${route.arg} key=${route.arg} />` : html`<${Destinations} />`;
    case 'pipeline': return html`<${Pipeline} />`;
    case 'receipts': return html`<${Receipts} values=${route.values} />`;
    case 'alarms': return html`<${Alarms} />`;
    case 'audit': return html`<${Audit} values=${route.values} />`;
    case 'find': return html`<${Find} values=${route.values} />`;
    case 'more': return html`<${More} />`;
    default: return html`<${Now} />`;
  }
}

const More = () => html`<section aria-label="More"><h1>More</h1><ul class="more">${VIEWS.slice(TABS).map(([view, word, sign]) => html`<li><a href=${to(view)}><${Icon} name=${sign} />${word}</a></li>`)}</ul></section>`;

const theme = () => document.documentElement.dataset.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
function turn() {
  document.documentElement.dataset.theme = theme() === 'dark' ? 'light' : 'dark';
  try { localStorage.setItem('postrider.theme', document.documentElement.dataset.theme); } catch { /* then for this visit */ }
}
try { document.documentElement.dataset.theme = localStorage.getItem('postrider.theme') ?? ''; } catch { /* as the system has it */ }

function Rail({ route }) {
  const { overview, session } = useLive();
  const current = route.view === 'find' ? '' : route.view;
  const link = ([view, word, sign, many], index) => html`<li class=${index >= TABS ? 'wide' : ''}><a href=${to(view)} aria-current=${current === view ? 'page' : undefined} title=${`key ${index + 1}`}>
    <${Icon} name=${sign} /><span>${word}</span>${many && html`<span class="n">${overview ? num(many(overview)) : ''}</span>`}</a></li>`;
  const isMore = VIEWS.slice(TABS).some(([view]) => view === current) || current === 'more';
  const daemon = overview?.daemon;
  return html`<header class="rail">
    <div class="brand"><${Icon} name="horn" />Postrider</div>
    <nav aria-label="Views"><ul>${VIEWS.map(link)}
      <li class="narrow"><a href=${to('more')} aria-current=${isMore ? 'page' : undefined}><${Icon} name="more" /><span>More</span></a></li></ul></nav>
    <dl>
      <dt>host</dt><dd title=${location.host}>${location.hostname}</dd>
      <dt>version</dt><dd>${plain(daemon?.version ?? session?.version ?? '–')}</dd>
      <dt>up</dt><dd>${daemon ? duration(seconds(daemon.started_at, now())) : '–'}</dd>
      <dt>profile</dt><dd>${plain(daemon?.profile ?? '–')}</dd>
      <dt>role</dt><dd>${session?.role ?? '–'}</dd>
      <dt>times</dt><dd>${zone()}</dd>
    </dl>
  </header>`;
}

const CONTACT = { connecting: 'connecting', lost: 'not live since', frozen: 'frozen at', token: 'no token' };
function Top() {
  const live = useLive();
  const [, tick] = useState(0);
  useEffect(() => { const timer = setInterval(() => tick((n) => n + 1), 1000); return () => clearInterval(timer); }, []);
  const time = live.heard == null ? '' : clock(now(), now());
  const isLive = live.contact === 'live';
  const is = theme();
  return html`<div class="top">
    <div class="brand"><${Icon} name="horn" />Postrider</div>
    <a class="find" href=${to('find')} title="What happened to… recipient or id, key /"><${Icon} name="find" /><span>What happened to… recipient or id</span><kbd aria-hidden="true">/</kbd></a>
    <button class="live" onClick=${freeze} disabled=${!['live', 'frozen'].includes(live.contact)} title="Freeze the numbers, key f"><i></i><span>${isLive ? `${time} live` : `${CONTACT[live.contact]} ${time}`}</span></button>
    <button class="btn sq" onClick=${() => { turn(); tick((n) => n + 1); }} title="Dark or light, key t" aria-label=${is === 'dark' ? 'Light' : 'Dark'}><${Icon} name=${is === 'dark' ? 'sun' : 'moon'} /></button>
    <button class="btn sq help" onClick=${() => openDialog(html`<${Help} />`)} title="Keys, ?" aria-label="Keys">?</button>
  </div>`;
}

function TokenForm() {
  const [value, setValue] = useState('');
  const submit = (event) => { event.preventDefault(); if (value.trim()) enter(value.trim()); };
  return html`<section class="token" aria-label="Token"><h1>This daemon wants a token.</h1>
    <p class="because flat">The one of <code>ops.view_token</code> to look, of <code>ops.operate_token</code> to give orders. It is kept in this tab until you close it, and goes nowhere else.</p>
    <form onSubmit=${submit}><label class="field">Token<input type="password" autocomplete="off" value=${value} onInput=${(event) => setValue(event.target.value)} autofocus /></label>
      <p class="said" role="alert">${plain(state.why)}</p>
      <button class="btn pri" disabled=${!value.trim()}>Go on</button></form></section>`;
}

function App() {
  const live = useLive();
  const route = useRoute();
  const view = useRef();
  const first = useRef(true);
  useEffect(() => {
    document.title = `${route.arg || route.view} · Postrider`;
    if (first.current) { first.current = false; return; }
    scrollTo(0, 0);
    if (!view.current.contains(document.activeElement)) view.current.focus({ preventScroll: true });
  }, [route.view, route.arg]);
  useEffect(() => { document.body.dataset.contact = live.contact; }, [live.contact]);
  return html`<a class="skip" href="#view" onClick=${(event) => { event.preventDefault(); view.current.focus(); }}>To the content</a>
    <${Rail} route=${route} />
    <main><${Top} /><div id="view" tabindex="-1" ref=${view}>${live.contact === 'token' ? html`<${TokenForm} />` : html`<${Viewed} route=${route} />`}</div></main>
    <${Dialogs} />`;
}

// From row to row: the link of a row has the focus, so that Enter opens it and a screen reader says it.
function step(by) {
  const links = [...document.querySelectorAll('#view .row .name')].filter((link) => link.offsetParent);
  if (!links.length) return;
  const at = links.findIndex((link) => link.closest('.row').contains(document.activeElement));
  const next = at < 0 ? (by > 0 ? 0 : links.length - 1) : Math.max(0, Math.min(links.length - 1, at + by));
  links[next].focus({ preventScroll: true });
  links[next].closest('.row').scrollIntoView({ block: 'nearest' });
}

addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isOpen() || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
  const { key } = event;
  const view = VIEWS[Number(key) - 1]?.[0];
  if (view) location.hash = to(view);
  else if (key === '/') location.hash = to('find');
  else if (key === '?') openDialog(html`<${Help} />`);
  else if (key === 't') turn();
  else if (key === 'f') freeze();
  else if (key === 'j') step(1);
  else if (key === 'k') step(-1);
  else if (key === 'h' || key === 'p' || key === 'R') document.querySelector(`#view [data-key="${key}"]:not(:disabled)`)?.click();
  else if (key === 'Escape' && here().arg) location.hash = to(here().view);
  else return;
  event.preventDefault();
});

start();
render(html`<${App} />`, document.getElementById('app'));
