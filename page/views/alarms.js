// Alarms: what is raised, what it asks for, and what was cleared.
import { clock, plain } from '../lib/format.js';
import { html } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { now, state, useAsk, useLive } from '../lib/store.js';
import { Icon, Loading, None, Section, Trouble } from '../lib/ui.js';

// Where the subject of an alarm is looked at.
function Subject({ alarm }) {
  const { subject } = alarm;
  if (!subject) return alarm.alarm === 'dead' ? html` <a href=${to('dead')}>Dead letters</a>` : null;
  if (state.destinations.some(({ name }) => name === subject)) return html` <a href=${alarm.alarm === 'dead' ? to('dead', null, { destination: subject }) : to('destinations', subject)}>${plain(subject)}</a>`;
  if (alarm.alarm === 'files') return html` <a href=${to('files', null, { q: subject })}>${plain(subject)}</a>`;
  return html` <span class="dim">${plain(subject)}</span>`;
}

function Alarm({ alarm }) {
  const isCleared = Boolean(alarm.cleared);
  const isCritical = alarm.severity === 'critical';
  return html`<li><${Icon} name=${isCleared ? 'ok' : isCritical ? 'alarm' : 'warn'} tone=${isCleared ? 'ok' : isCritical ? 'dead' : 'retry'} />
    <span><b>${isCleared ? '' : html`<span class="vh">${alarm.severity}: </span>`}${plain(alarm.alarm)}: ${plain(alarm.text)}</b></span>
    <span class="t">${isCleared ? `cleared ${clock(alarm.cleared, now())}` : `since ${clock(alarm.since, now())}`}</span>
    <p>${alarm.remedy && `${plain(alarm.remedy)}.`}${isCleared && ` Raised ${clock(alarm.since, now())}.`}<${Subject} alarm=${alarm} /></p></li>`;
}
export const AlarmList = ({ alarms, none }) => (alarms.length ? html`<ul class="events">${alarms.map((alarm) => html`<${Alarm} alarm=${alarm} key=${`${alarm.alarm} ${alarm.subject} ${alarm.since}`} />`)}</ul>` : html`<${None}><${Icon} name="ok" tone="ok" /> ${none}<//>`);

export function Alarms() {
  const live = useLive();
  const { data, error, again } = useAsk('/alarms', 5_000);
  const raised = live.overview?.alarms ?? data?.items;
  const title = !raised ? 'Alarms' : raised.length ? `${raised.length === 1 ? 'One alarm is' : `${raised.length} alarms are`} raised.` : 'No alarm is raised.';
  return html`<section aria-label="Alarms"><div class="answer"><${Icon} name=${raised?.length ? 'warn' : 'ok'} tone=${raised?.length ? 'retry' : live.contact === 'live' ? 'ok' : ''} /><h1>${title}</h1></div></section>
    <${Trouble} error=${error} again=${again} />
    <${Section} title="Raised" note=${raised?.length}>${raised ? html`<${AlarmList} alarms=${raised} none="None." />` : html`<${Loading} />`}<//>
    <${Section} title="Cleared" note="since the process began, 100 at most">${data ? html`<${AlarmList} alarms=${data.cleared} none="None was." />` : html`<${Loading} />`}<//>`;
}
