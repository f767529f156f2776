// Now: will it be done in time, and if not, why. Everything else on the page is detail.
import { Charts, Errors, Latency, Throughput } from '../lib/charts.js';
import { by, clock, count, duration, minute, num, plain, rate, seconds } from '../lib/format.js';
import { html, useEffect, useRef, useState } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { loadSeries, now, state, useAsk, useLive } from '../lib/store.js';
import { Asked, Because as Binds, Foreign, Icon, None, Section } from '../lib/ui.js';
import { AlarmList } from './alarms.js';
import { DestinationTable } from './destinations.js';
import { FileTable, became } from './files.js';

const FILES = 6;

// The answer: sign, colour, sentence. A finish time is rounded up; no time is promised where none is known.
function answer({ contact, heard, overview }) {
  if (contact === 'lost') return ['warn', 'retry', `No contact with the daemon since ${clock(heard, Date.now())}. What follows is the last known.`];
  const { open, done_at: done, finish_by: due, files, daemon } = overview;
  const total = Object.values(files).reduce((sum, n) => sum + n, 0);
  if (daemon.phase !== 'ready') return ['clock', '', `The daemon is ${daemon.phase}.`];
  if (open == null) return ['warn', 'retry', 'The store can’t say what is left to send.'];
  if (due && due.open > 0) {
    const name = plain(due.file);
    const at = minute(due.at, now());
    if (due.in_time) return ['ok', 'ok', html`Yes. ${name} is sent by ${by(due.done_at, now())}, ${duration(Math.floor(seconds(due.done_at, due.at) / 60) * 60).replace(' 00 s', '')} before ${at}.`];
    if (due.done_at) return ['stop', 'dead', html`No. ${name} is sent by ${by(due.done_at, now())}, and it is due at ${at}.`];
    if (due.latest && Date.parse(due.latest) > now()) return ['stop', 'dead', html`Nothing of ${name} moves. It is done by ${at} only if it goes on by ${minute(due.latest, now())}.`];
    return ['stop', 'dead', html`Nothing of ${name} moves. ${due.latest ? `It will not be done by ${at}.` : `It is due at ${at}.`}`];
  }
  if (files.reading > 0 && open === 0) return ['go', 'sent', `${count(files.reading, 'file is', 'files are')} being read.`];
  if (open === 0) return total === 0 ? ['pending', '', 'Nothing was dropped yet. Everything is ready.'] : ['ok', 'ok', 'Everything is sent.'];
  if (done) return ['go', 'sent', `Everything is sent by ${by(done, now())}.`];
  if (overview.sent_per_s > 0) return ['go', 'sent', `${count(open, 'message is', 'messages are')} on the way.`];
  return ['stop', 'retry', `${count(open, 'message waits', 'messages wait')}, and nothing moves.`];
}

function Because({ contact, overview }) {
  if (contact === 'lost') return html`The page tries again every 2 s. Sending does not need this page: on the machine, <span class="why">postrider status</span> says how it stands. ${plain(state.why)}`;
  const { open, sent_per_s: sent, ceiling, ceiling_of: at, left_s: left, files } = overview;
  if (!open && files.reading + files.sending === 0) return html`${files.held > 0 ? html`<a href=${to('files', null, { state: 'held' })}>${count(files.held, 'file')}</a> held and not counted. ` : ''}Drop a file into a feed’s directory, and this page shows what becomes of each row.`;
  // What changes each second stands last, so that it moves nothing.
  return html`${ceiling && html`<${Binds} ceiling=${ceiling} of=${at} />`}${files.held > 0 ? html`<a href=${to('files', null, { state: 'held' })}>${count(files.held, 'file')}</a> held and not counted. ` : ''}
    <b>${num(open)}</b> to send at <b>${rate(sent)}</b>${left != null ? html`, ${duration(left)} left` : ''}.`;
}

// From the first drop to the deadline: sent (solid), projected (hatched), slack (dotted), deadline (flag).
function Track({ overview, files }) {
  const open = files.filter((file) => file.claimed_at && (file.open > 0 || file.state === 'reading'));
  if (!open.length) return html`<div class="track"></div>`;
  const start = Math.min(...open.map((file) => Date.parse(file.claimed_at)));
  const at = now();
  const due = overview.finish_by && Date.parse(overview.finish_by.at);
  const done = overview.done_at && Date.parse(overview.done_at);
  const isStopped = !done && !(overview.sent_per_s > 0);
  const stopped = isStopped && overview.ceiling?.since ? Math.max(start, Date.parse(overview.ceiling.since)) : null;
  const latest = isStopped && overview.finish_by?.latest ? Date.parse(overview.finish_by.latest) : null;
  const end = Math.max(at + 60_000, due ?? 0, done ?? 0);
  const place = (time) => Math.max(0, Math.min(100, ((time - start) / (end - start)) * 100));
  // By transform, so that what moves with time moves nothing else.
  const stand = (time) => ({ '--x': place(time) });
  const span = (from, until) => ({ ...stand(from), width: `${Math.max(0, place(until) - place(from))}%` });
  // What stands above the line at the right of now: when it is done, or when it must go on.
  const next = done ?? (latest > at ? latest : null);
  const near = next && place(next) - place(at) < 26;
  const words = done ? `done ${by(done, at)}` : latest > at ? `must go on by ${minute(latest, at)}` : 'no finish time is known';
  return html`<div class="track" role="img" aria-label=${`Started ${clock(start, at)}, ${words}${due ? `, due ${minute(due, at)}` : ''}`}>
    ${!(near && (place(next) > 84 || place(at) < 12)) && html`<span class="lab up" style=${stand(at)} data-end=${near || place(at) > 80 ? 'r' : place(at) < 8 ? 'l' : ''}>${isStopped ? 'stopped' : 'now'} ${minute(stopped ?? at, at)}</span>`}
    ${next && html`<span class="lab up strong" style=${stand(next)} data-end=${place(next) > 84 ? 'r' : near ? 'l' : ''}>${words}</span>`}
    <span class="rail-line"></span><i class="seg solid" style=${span(start, stopped ?? at)}></i>
    ${stopped && html`<i class="seg stopped" style=${span(stopped, at)}></i>`}
    ${done && html`<i class="seg projected" style=${span(at, done)}></i>`}
    ${latest > at && due && html`<i class="seg projected" style=${span(latest, due)}></i>`}
    ${done && due && due > done && html`<i class="seg slack" style=${span(done, due)}></i>`}
    <i class="mark" style=${stand(at)}></i>
    ${due && html`<i class="mark flag" style=${stand(due)}></i><span class="lab low" style=${stand(due)} data-end=${place(due) > 86 ? 'r' : ''}>${minute(due, at)} finish_by</span>`}
    <span class="lab low first">${minute(start, at)}</span>
  </div>`;
}

export function AlarmLine({ alarms }) {
  const first = alarms[0];
  if (!first) return html`<p class="alarmline" role="status"><${Icon} name="ok" tone=${state.contact === 'live' ? 'ok' : ''} /><span>No alarm.</span></p>`;
  return html`<p class=${`alarmline ${first.severity}`} role="status"><${Icon} name=${first.severity === 'critical' ? 'alarm' : 'warn'} tone=${first.severity === 'critical' ? 'dead' : 'retry'} />
    <span><b>${count(alarms.length, 'alarm')}.</b> ${plain(first.alarm)}: ${plain(first.text)}${first.subject && !first.text.includes(first.subject) ? ` (${plain(first.subject)})` : ''}, since ${clock(first.since, now())}${alarms.length > 1 ? `. And ${num(alarms.length - 1)} more` : ''}</span>
    <a href=${to('alarms')}>${alarms.length > 1 ? `See all ${alarms.length}` : 'See it'}</a></p>`;
}

// Rows come, go and change places only while nobody points at them.
function useCalm(items, keyOf) {
  const host = useRef();
  const order = useRef([]);
  const isBusy = host.current?.matches(':hover, :focus-within');
  const found = new Map(items.map((item) => [keyOf(item), item]));
  if (!isBusy || order.current.length === 0) order.current = [...order.current.filter((key) => found.has(key)), ...[...found.keys()].filter((key) => !order.current.includes(key))];
  return [host, order.current.map((key) => found.get(key) ?? state.files.get(key)).filter(Boolean)];
}

const Ready = ({ overview }) => html`<section aria-label="What comes next"><ol class="steps">
  <li><${Icon} name="ok" tone="ok" /><div><h2>The daemon runs</h2><p>since ${clock(overview.daemon.started_at, now())}, with ${count(overview.daemon.feeds, 'feed')} and ${count(overview.daemon.destinations, 'destination')}. Configuration: <code>${plain(overview.daemon.config)}</code></p></div></li>
  <li><${Icon} name="pending" /><div><h2>Try the file first</h2><p>Counts rows, finds rejects, shows bodies and the finish time. Sends nothing.</p><pre>postrider preflight users.csv --feed FEED</pre></div></li>
  <li><${Icon} name="pending" /><div><h2>Drop it</h2><p>Copy under a dotted name, then rename: half a file is never seen.</p><pre>cp users.csv DIRECTORY/.users.csv${'\n'}mv DIRECTORY/.users.csv DIRECTORY/users.csv</pre></div></li>
  <li><${Icon} name="tip" /><div><h2>No file at hand?</h2><p>The demo makes its own rows and its own receiver.</p><pre>postrider demo</pre></div></li>
</ol></section>`;

function Settled() {
  return html`<${Section} title="Done last" aside=${html`<a href=${to('files', null, { state: 'done' })}>All that are done</a>`}>
    <${Asked} asked=${useAsk('/files?state=done&limit=5', 10_000)} none="No file is done yet.">${({ items }) => html`<ul class="events">${items.map((file) => html`<li key=${file.id}><${Icon} name="ok" tone="ok" /><a href=${to('files', file.id)}><b><${Foreign} text=${file.name} /></b></a><span class="t">${clock(file.settled_at, now())}</span><p>${became(file)}. Took ${duration(file.took_s)}.</p></li>`)}</ul>`}<//><//>`;
}

export function Now() {
  const live = useLive();
  const [which, setWhich] = useState('');
  useEffect(() => { loadSeries(which).catch(() => {}); }, [which, live.contact]);
  const [host, files] = useCalm((live.openFiles ?? []).slice(0, FILES), (file) => file.id ?? `${file.feed}/${file.name}`);
  const { overview } = live;
  if (!overview) return html`<section aria-label="Now"><div class="answer"><${Icon} name="clock" /><h1>${live.contact === 'lost' ? 'No contact with the daemon.' : 'Asking the daemon…'}</h1></div><p class="because">${plain(live.why)}</p></section>`;
  const [sign, tone, words] = answer(live);
  const open = Object.entries(overview.files).filter(([key]) => ['reading', 'sending', 'held', 'waiting'].includes(key)).reduce((sum, [, n]) => sum + n, 0);
  const isEmpty = open === 0 && overview.files.done + overview.files.failed === 0;
  return html`<section class="verdict" aria-label="The answer">
      <div class="answer"><${Icon} name=${sign} tone=${tone} /><h1>${words}</h1></div>
      <p class="because"><${Because} ...${live} /></p>
      ${!isEmpty && html`<${Track} overview=${overview} files=${live.openFiles ?? []} />`}
      <${AlarmLine} alarms=${overview.alarms} />
      ${overview.parked.map((feed) => html`<p class="alarmline warning" key=${feed.feed}><${Icon} name="stop" tone="retry" /><span><b>Feed ${plain(feed.feed)} is parked</b> since ${clock(feed.since, now())}: ${plain(feed.reason)}</span></p>`)}
    </section>
    ${isEmpty ? html`<${Ready} overview=${overview} />` : html`
    <${Section} title="Last 15 minutes" aside=${html`<label class="pick"><span class="vh">Destination of the charts</span><select value=${which} onChange=${(event) => setWhich(event.target.value)}><option value="">All destinations</option>${live.destinations.map(({ name }) => html`<option value=${name}>${name}</option>`)}</select></label>`}>
      <${Charts} destination=${which} kinds=${[Throughput, Latency, Errors]} /><//>
    <${Section} title="Files in flight" note=${num(open)} aside=${html`<a href=${to('files')}>All files</a>`}>
      <div ref=${host} class="calm">${files.length ? html`<${FileTable} caption="Files in flight" files=${files} />` : html`<${None}>No file is in flight.<//>`}</div>
      ${open > files.length && files.length > 0 && html`<div class="foot"><span>Showing ${num(files.length)} of ${num(open)} files in flight.</span><a class="r" href=${to('files', null, { state: 'open' })}>See all</a></div>`}<//>
    <${Section} title="Destinations" note=${num(live.destinations.length)}><${DestinationTable} destinations=${live.destinations} /><//>
    <div class="two"><${Section} title="Alarms" note=${overview.alarms.length ? `${overview.alarms.length} raised` : 'none raised'}><${AlarmList} alarms=${overview.alarms.slice(0, 5)} none="No alarm is raised." /><//><${Settled} /></div>`}`;
}
